"""Copies a run of blocks out of a cache in host memory to the device.

On a GPU XLA may not slice an array in pinned host memory: it computes the indices on the host, and
looks for all that follows from them in exponential time. A kernel reads the blocks instead.

Axes: B batch, K KV heads, P blocks of C tokens, H head size.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.cache_rows import row_operand, row_spec, task_index, task_spec
from pallas_kernels.compat import silence_triton_deprecation
from pallas_kernels.registry import Implementation, dispatch, require_gpu

TILE_BYTES = 16 * 1024
"""What one program copies: enough in flight for the bus, few enough registers."""


def copy_blocks(
    cache: jax.Array,
    first: jax.Array,
    num_blocks: int,
    *,
    rows: tuple[jax.Array, int] | None = None,
    implementation: Implementation = None,
) -> jax.Array:
    """Copies blocks `first` to `first + num_blocks` of every task.

    Args:
      cache: `[B, K, P, C, H]`, any dtype; for "triton" in device or pinned host memory.
      first: int32 scalar, at most `P - num_blocks`.
      num_blocks: how many, at least 1.
      rows: `(first_row int32 [1], B)` if the cache holds several layers, as `[R, K, P, C, H]`: the
        B rows from this one on are copied, which must be there. None for all rows.
      implementation: "triton" runs on a GPU, "xla" everywhere on device memory; None for the best
        available.

    Returns:
      `[B, K, num_blocks, C, H]` in device memory.

    Raises:
      ValueError: there are fewer blocks than that.
      UnsupportedImplementationError: if no implementation asked for works here.
    """
    if not 1 <= num_blocks <= cache.shape[2]:
        raise ValueError(
            f"expected 1 to {cache.shape[2]} blocks, got {num_blocks}; copy what there is"
        )
    first_row, batch = (None, cache.shape[0]) if rows is None else rows
    candidates = {"triton": copy_blocks_triton, "xla": _xla}
    return dispatch(  # type: ignore[no-any-return]
        "copy_blocks",
        implementation,
        candidates,
        *(cache, first, first_row),
        num_blocks=num_blocks,
        batch=batch,
    )


def _xla(
    cache: jax.Array, first: jax.Array, first_row: jax.Array | None, num_blocks: int, batch: int
) -> jax.Array:
    start = (0 if first_row is None else first_row[0], 0, first, 0, 0)
    return jax.lax.dynamic_slice(
        cache, start, (batch, cache.shape[1], num_blocks, *cache.shape[3:])
    )


def copy_blocks_triton(
    cache: jax.Array,
    first: jax.Array,
    first_row: jax.Array | None,
    num_blocks: int,
    batch: int,
    *,
    interpret: bool = False,
) -> jax.Array:
    """The kernel; see `copy_blocks`. With `interpret` it runs on any platform, slowly."""
    require_gpu(interpret)
    kv_heads, _, tokens, head_dim = cache.shape[1:]
    task_size = num_blocks * tokens * head_dim
    tile = TILE_BYTES // cache.dtype.itemsize
    silence_triton_deprecation()
    copied = pl.pallas_call(
        functools.partial(_kernel, kv_heads=kv_heads),
        grid=(batch * kv_heads, pl.cdiv(task_size, tile)),
        in_specs=[
            pl.BlockSpec((1,), lambda task, part: (0,)),
            task_spec(cache.shape, first_row),
            *row_spec(first_row),
        ],
        out_specs=pl.BlockSpec((None, task_size), lambda task, part: (task, 0)),
        out_shape=jax.ShapeDtypeStruct((batch * kv_heads, task_size), cache.dtype),
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="copy_blocks",
    )(first.astype(jnp.int32).reshape(1), cache, *row_operand(first_row))
    return copied.reshape(batch, kv_heads, num_blocks, tokens, head_dim)


def _kernel(first_ref: Any, cache_ref: Any, *refs: Any, kv_heads: int) -> None:
    *row_refs, out_ref = refs
    own = task_index(pl.program_id(0), kv_heads, row_refs)
    tokens, head_dim = cache_ref.shape[-2:]
    tile = TILE_BYTES // out_ref.dtype.itemsize
    place = pl.program_id(1) * tile + jnp.arange(tile, dtype=jnp.int32)
    mask = place < out_ref.shape[0]
    row = place // head_dim
    block = first_ref[0] + row // tokens
    index = (*own, block, row % tokens, place % head_dim)
    values = pltriton.load(cache_ref.at[index], mask=mask, other=0)
    pltriton.store(out_ref.at[place], values, mask=mask)
