"""Scores of units as a Pallas kernel in the Triton style, over summaries in device or host memory.

XLA may not compute with arrays in pinned host memory, but a kernel can read them where they lie,
and then reads no more than the rows of each task's own granularity. The products are those of int8
tensor cores: ordinary ones take longer than the memory.

Axes: B batch, N query heads, K KV heads, G = N // K, P blocks, U summary rows, H head size.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.cache_rows import check_offsets, row_operand, row_spec, task_index, task_spec
from pallas_kernels.compat import silence_triton_deprecation
from pallas_kernels.registry import require_gpu
from pallas_kernels.scoring import BEYOND, first_unit_row, unit_shift

TILE_UNITS = 64
"""Units of one program: 16 KiB of summaries at a head size of 128, in flight all at once."""

NUM_WARPS = 4
_LEAST_CHANNELS = 32
_LEAST_HEADS = 16


def score_units_triton(
    q8: jax.Array,
    summaries: jax.Array,
    granularity: jax.Array,
    host_blocks: jax.Array,
    ranked: jax.Array,
    first_row: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Scores the first units of every task; see `pallas_kernels.score_units`.

    Args:
      q8: int8 `[B, N, H]`.
      summaries: int8 `[B, K, U, 2, H]`, in device or pinned host memory.
      granularity: int32 `[B, K]`, tokens of a unit.
      host_blocks: int32 `[B]`.
      ranked: bool or int32 `[B, K]`; where it is 0 no row is read.
      first_row: int32 `[1]`, or None for summaries of one layer.
      interpret: run on any platform, slowly; for tests.

    Returns:
      int32 `[B, N, P]`, the smallest int32 from the number of units on.

    Raises:
      UnsupportedImplementationError: not on a GPU, or sizes that Triton takes wrongly.
    """
    require_gpu(interpret)
    batch, num_heads, head_dim = q8.shape
    check_offsets(summaries)
    num_kv_heads, rows = summaries.shape[1:3]
    num_blocks = rows * 8 // 15
    group = num_heads // num_kv_heads
    tasks = batch * num_kv_heads

    def whole_task(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda task, _: (task,) + (0,) * len(shape))

    scalar = pl.BlockSpec((1,), lambda task, _: (task,))
    row = pl.BlockSpec((1,), lambda task, _: (task // num_kv_heads,))
    silence_triton_deprecation()
    scores = pl.pallas_call(
        functools.partial(_kernel, num_kv_heads=num_kv_heads, group=group),
        grid=(tasks, pl.cdiv(num_blocks, TILE_UNITS)),
        in_specs=[
            whole_task(group, head_dim),
            task_spec(summaries.shape, first_row),
            scalar,
            row,
            scalar,
            *row_spec(first_row),
        ],
        out_specs=whole_task(group, num_blocks),
        out_shape=jax.ShapeDtypeStruct((tasks, group, num_blocks), jnp.int32),
        compiler_params=pltriton.CompilerParams(num_warps=NUM_WARPS, num_stages=1),
        interpret=interpret,
        name="score_units",
    )(
        q8.reshape(tasks, group, head_dim),
        summaries,
        granularity.astype(jnp.int32).reshape(-1),
        host_blocks.astype(jnp.int32),
        ranked.astype(jnp.int32).reshape(-1),
        *row_operand(first_row),
    )
    return scores.reshape(batch, num_heads, num_blocks)


def _kernel(
    q_ref: Any,
    summaries_ref: Any,
    granularity_ref: Any,
    host_blocks_ref: Any,
    ranked_ref: Any,
    *refs: Any,
    num_kv_heads: int,
    group: int,
) -> None:
    *row_refs, out_ref = refs
    own = task_index(pl.program_id(0), num_kv_heads, row_refs)
    head_dim = q_ref.shape[-1]
    # Tensor cores take sizes that are powers of two; what is not there counts 0.
    channel = jnp.arange(max(pl.next_power_of_2(head_dim), _LEAST_CHANNELS), dtype=jnp.int32)
    head = jnp.arange(max(pl.next_power_of_2(group), _LEAST_HEADS), dtype=jnp.int32)
    unit = pl.program_id(1) * TILE_UNITS + jnp.arange(TILE_UNITS, dtype=jnp.int32)
    shift = unit_shift(granularity_ref[0])
    units = (host_blocks_ref[0] + (jnp.int32(1) << shift) - 1) >> shift
    exists = (unit < units) & (ranked_ref[0] != 0)

    def load(
        ref: Any, own: tuple[jax.Array, ...], row: jax.Array, wanted: jax.Array, *half: int
    ) -> jax.Array:
        shape = (row.size, channel.size)
        index = (
            *own,
            jnp.broadcast_to(row[:, None], shape),
            *half,
            jnp.broadcast_to(channel[None, :], shape),
        )
        mask = jnp.broadcast_to(wanted[:, None] & (channel < head_dim)[None, :], shape)
        return pltriton.load(ref.at[index], mask=mask, other=0)

    row = first_unit_row(shift, out_ref.shape[-1]) + unit
    low, high = (load(summaries_ref, own, row, exists, half) for half in (0, 1))
    q = load(q_ref, (), head, head < group).astype(jnp.int32)
    # max(q * low, q * high) is q * low for a negative q and q * high otherwise, as low <= high.
    negative, positive = (x.astype(jnp.int8) for x in (jnp.minimum(q, 0), jnp.maximum(q, 0)))
    scores = _products(low, negative) + _products(high, positive)
    shape = (TILE_UNITS, head.size)
    index = (jnp.broadcast_to(head[None, :], shape), jnp.broadcast_to(unit[:, None], shape))
    mask = (head < group)[None, :] & (unit < out_ref.shape[-1])[:, None]
    scores = jnp.where(exists[:, None], scores, BEYOND)
    pltriton.store(out_ref.at[index], scores, mask=jnp.broadcast_to(mask, shape))


def _products(bounds: jax.Array, q: jax.Array) -> jax.Array:
    """Every unit's with every head, int32 `[units, heads]`."""
    return jax.lax.dot_general(
        bounds, q, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
    )
