"""Block-sparse attention as a Pallas kernel in the Triton style.

JAX has deprecated this backend, so everything that needs it is in this file. It serves GPUs that
Mosaic does not. Keys and values may lie in pinned host memory: the kernel loads what it needs
straight from there, over the bus.

Decode attention at this place is bound by memory, so the kernel multiplies in float32 on ordinary
cores, one query head after the other on the same tile of keys and values in registers. That keeps
float32 accuracy and exact masks per head.

Axes: B batch, N query heads, K KV heads, G = N // K, P blocks of C tokens, H head size, S splits.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.block_list_triton import block_table_triton
from pallas_kernels.block_table import MAX_GROUP, BlockTable
from pallas_kernels.cache_rows import row_operand, row_spec, task_index, task_spec
from pallas_kernels.compat import silence_triton_deprecation
from pallas_kernels.merge_splits_triton import merge_splits
from pallas_kernels.registry import UnsupportedImplementationError, require_gpu


class Tiling(NamedTuple):
    """How the work is cut.

    Attributes:
      tile_blocks: blocks of one load.
      num_warps: warps of a program.
      programs: programs in flight, a few on each of the 100 to 150 multiprocessors of a large GPU.
    """

    tile_blocks: int = 4
    num_warps: int = 4
    programs: int = 512


TILING = Tiling()


def block_sparse_attention_triton(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bitmap: jax.Array,
    *,
    scale: float,
    tiling: Tiling = TILING,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attends to selected blocks; see `pallas_kernels.block_sparse_attention`.

    Args:
      q: float32, bfloat16 or float16 `[B, N, H]`.
      k: float32, bfloat16 or float16 `[B, K, P, C, H]`, in device or pinned host memory.
      v: likewise.
      bitmap: uint32 `[B, N, W]`.
      scale: multiplies `q . k`.
      tiling: how the work is cut; the default is the best for most shapes.
      interpret: run on any platform, slowly; for tests.

    Returns:
      `out` float32 `[B, N, H]` and `lse` float32 `[B, N]`.

    Raises:
      UnsupportedImplementationError: if sizes or platform do not suit Triton.
    """
    out, lse, _ = share_attention_triton(
        q, k, v, bitmap, None, scale=scale, tiling=tiling, interpret=interpret
    )
    return out, lse


def share_attention_triton(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bitmap: jax.Array,
    boundary: jax.Array | None,
    first_row: jax.Array | None = None,
    *,
    scale: float,
    tiling: Tiling = TILING,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attends to the blocks from a boundary on; see `pallas_kernels.share_attention`."""
    _, num_kv_heads, num_blocks, block_tokens, head_dim = k.shape
    group = q.shape[1] // num_kv_heads
    _check(head_dim, block_tokens, group, interpret)
    table = block_table_triton(bitmap, num_kv_heads, num_blocks, interpret, boundary=boundary)
    state = attend_to_table(
        q, k, v, table, first_row, scale=scale, tiling=tiling, interpret=interpret
    )
    return *state, table.total.reshape(-1, num_kv_heads)


def attend_to_table(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    table: BlockTable,
    first_row: jax.Array | None = None,
    *,
    scale: float,
    tiling: Tiling = TILING,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attends to the blocks of a table; the rest is as in `share_attention_triton`."""
    batch, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    group = num_heads // num_kv_heads
    tasks = batch * num_kv_heads
    tiles = pl.cdiv(table.block.shape[1], tiling.tile_blocks)
    splits = max(1, min(tiles, tiling.programs // tasks))

    def whole_task(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda task, _: (task,) + (0,) * len(shape))

    cache = task_spec(k.shape, first_row)
    silence_triton_deprecation()
    out, lse = pl.pallas_call(
        functools.partial(
            _kernel,
            num_kv_heads=num_kv_heads,
            group=group,
            splits=splits,
            tile_blocks=tiling.tile_blocks,
            scale=scale,
        ),
        grid=(tasks, splits),
        in_specs=[
            whole_task(group, head_dim),
            cache,
            cache,
            whole_task(table.block.shape[1]),
            whole_task(table.heads.shape[1]),
            pl.BlockSpec((1,), lambda task, _: (task,)),
            *row_spec(first_row),
        ],
        out_specs=[
            pl.BlockSpec((None, None, group, head_dim), lambda task, s: (s, task, 0, 0)),
            pl.BlockSpec((None, None, group), lambda task, s: (s, task, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((splits, tasks, group, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((splits, tasks, group), jnp.float32),
        ],
        compiler_params=pltriton.CompilerParams(num_warps=tiling.num_warps, num_stages=1),
        interpret=interpret,
        name="block_sparse_attention",
    )(
        q.astype(jnp.float32).reshape(tasks, group, head_dim),
        k,
        v,
        table.block,
        table.heads,
        table.total,
        *row_operand(first_row),
    )
    out, lse = merge_splits(out, lse, interpret)
    return out.reshape(q.shape), lse.reshape(batch, num_heads)


def _check(head_dim: int, block_tokens: int, group: int, interpret: bool) -> None:
    require_gpu(interpret)
    for name, size in (("head size", head_dim), ("tokens of a block", block_tokens)):
        if size & (size - 1):
            raise UnsupportedImplementationError(
                f"expected a power of two as {name}, got {size}; use 'xla'"
            )
    if group > MAX_GROUP:
        raise UnsupportedImplementationError(
            f"expected at most {MAX_GROUP} query heads per KV head, got {group}; use 'xla'"
        )


def _kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    block_ref: Any,
    heads_ref: Any,
    total_ref: Any,
    *refs: Any,
    num_kv_heads: int,
    group: int,
    splits: int,
    tile_blocks: int,
    scale: float,
) -> None:
    """One split of one task: every `splits`-th tile of its table."""
    *row_refs, out_ref, lse_ref = refs
    head_dim = q_ref.shape[-1]
    split = pl.program_id(1)
    own = task_index(pl.program_id(0), num_kv_heads, row_refs)
    total_blocks = total_ref[0]
    tiles = (total_blocks + tile_blocks - 1) // tile_blocks

    def attend_tile(step: jax.Array, sums: tuple[Any, ...]) -> tuple[Any, ...]:
        first = (split + step * splits) * tile_blocks
        entry = first + jnp.arange(tile_blocks, dtype=jnp.int32)
        # What is past the end of the table is undefined.
        block, heads = (
            pltriton.load(ref.at[entry], mask=entry < total_blocks, other=0)
            for ref in (block_ref, heads_ref)
        )
        k = _load_tile(k_ref, own, block, heads != 0)
        v = _load_tile(v_ref, own, block, heads != 0)
        return tuple(
            _attend(q_ref[g, :] * scale, k, v, (heads >> g) & 1, sums[g]) for g in range(group)
        )

    start = (jnp.float32(-jnp.inf), jnp.float32(0.0), jnp.zeros((head_dim,), jnp.float32))
    steps = jnp.maximum(tiles - split + splits - 1, 0) // splits
    for g, (largest, total, weighted) in enumerate(
        jax.lax.fori_loop(0, steps, attend_tile, (start,) * group)
    ):
        divisor = jnp.where(total == 0.0, 1.0, total)
        out_ref[g, :] = weighted / divisor
        lse_ref[g] = jnp.where(total == 0.0, -jnp.inf, largest + jnp.log(divisor))


def _load_tile(
    ref: Any, own: tuple[jax.Array, ...], block: jax.Array, in_table: jax.Array
) -> jax.Array:
    shape = (*block.shape, *ref.shape[-2:])
    index = (
        *own,
        jnp.broadcast_to(block[:, None, None], shape),
        jax.lax.broadcasted_iota(jnp.int32, shape, 1),
        jax.lax.broadcasted_iota(jnp.int32, shape, 2),
    )
    # What is past the end of the table is not even read.
    mask = jnp.broadcast_to(in_table[:, None, None], shape)
    tile = pltriton.load(ref.at[index], mask=mask, other=0.0)
    return tile.astype(jnp.float32).reshape(-1, shape[-1])


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, selected: jax.Array, sums: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Adds a tile to the sums of one head: q `[H]`; k, v `[tokens, H]`; selected `[blocks]`."""
    largest, total, weighted = sums
    tokens, blocks = k.shape[0], selected.shape[0]
    per_block = jnp.broadcast_to((selected != 0)[:, None], (blocks, tokens // blocks))
    mask = per_block.reshape(tokens)
    scores = jnp.where(mask, jnp.sum(k * q[None, :], axis=1), -jnp.inf)
    new_largest = jnp.maximum(largest, jnp.max(scores, axis=0))
    finite = jnp.where(new_largest == -jnp.inf, 0.0, new_largest)
    weights = jnp.exp(scores - finite)
    decay = jnp.exp(largest - finite)
    # The mask, not the zero weight, keeps out a NaN that only another head selected.
    product = jnp.sum(jnp.where(mask[:, None], weights[:, None] * v, 0.0), axis=0)
    return (
        new_largest,
        total * decay + jnp.sum(weights, axis=0),
        weighted * decay + product,
    )
