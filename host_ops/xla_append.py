"""Writing blocks and their summaries for the XLA tier, in place when the cache is donated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from host_ops import compat
from host_ops.in_place import call_in_place
from host_ops.types import STATUS_INVALID, Flush
from host_ops.xla_tiles import for_each_tile

_TILE_ROWS = 64
_BLOCKS_PER_UNIT = (1, 2, 4, 8)


def invalid_flush(flush: Flush, num_blocks: int) -> jax.Array:
    """Status int32: `STATUS_INVALID` if a count, or what is written where, is outside its range."""
    first, count = flush.first_block, flush.num_blocks
    good = (count >= 0) & (count <= flush.k.shape[2])
    inside = (first >= 0) & (first <= num_blocks - count)
    good &= (count == 0) | (inside & (flush.shift >= 0).all(axis=(1, 2)))
    return jnp.where(good.all(), 0, STATUS_INVALID).astype(jnp.int32)


def write_blocks(
    k: jax.Array, v: jax.Array, flush: Flush, enabled: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Writes the keys and values of a valid flush.

    Args:
      k: `[B, K, P, C, H]`, typed as device memory.
      v: likewise.
      flush: what to write.
      enabled: bool scalar, nothing is written without it.

    Returns:
      `(k, v)`, in place if donated.
    """
    counts = jnp.where(enabled, flush.num_blocks, 0)
    if k.dtype == jnp.bfloat16 and not compat.XLA_CPU_WRITES_BFLOAT16_IN_PLACE:
        return _write_blocks_by_callback(k, v, flush, counts)

    def write(
        b: jax.Array, i: jax.Array, cache: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        k, v = cache
        at = (b, 0, flush.first_block[b] + i, 0, 0)
        k = jax.lax.dynamic_update_slice(k, _block(flush.k, b, i), at)
        v = jax.lax.dynamic_update_slice(v, _block(flush.v, b, i), at)
        return k, v

    return for_each_tile(counts, 1, write, (k, v))


def write_summaries(
    summaries: jax.Array, flush: Flush, enabled: jax.Array | bool = True
) -> jax.Array:
    """Writes the summaries of a valid flush, wherever they are kept.

    Args:
      summaries: int8 `[B, K, U, 2, H]`, typed as device memory.
      flush: what to write; its keys and values are not looked at.
      enabled: bool scalar, nothing is written without it.

    Returns:
      The new summaries, in place if donated.
    """
    # U rows are P + P/2 + P/4 + P/8.
    num_blocks = summaries.shape[2] * 8 // 15
    counts = jnp.where(enabled, flush.num_blocks, 0)

    def write(b: jax.Array, i: jax.Array, summaries: jax.Array) -> jax.Array:
        block = flush.first_block[b] + i
        return _store(summaries, _block(flush.summaries, b, i), b, block, num_blocks)

    summaries = _requantise(summaries, flush, counts)
    return for_each_tile(counts, 1, write, summaries)


def _write_blocks_by_callback(
    k: jax.Array, v: jax.Array, flush: Flush, counts: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def write(cache: Sequence[np.ndarray], _: Sequence[np.ndarray], operands: Any) -> None:
        k, v = cache
        new_k, new_v, first_block, counts = operands
        for b, (first, count) in enumerate(zip(first_block, counts, strict=True)):
            k[b, :, first : first + count] = new_k[b, :, :count]
            v[b, :, first : first + count] = new_v[b, :, :count]

    operands = (flush.k, flush.v, flush.first_block, counts)
    (k, v), _ = call_in_place(write, [k, v], (), operands)
    return k, v


def _block(blocks: jax.Array, b: jax.Array, i: jax.Array) -> jax.Array:
    """Block `i` of sequence `b` of `[B, K, M, x, H]`, as `[1, K, 1, x, H]`."""
    shape = blocks.shape
    return jax.lax.dynamic_slice(blocks, (b, 0, i, 0, 0), (1, shape[1], 1, shape[3], shape[4]))


def _level_offset(level: int, num_blocks: int) -> int:
    return sum(num_blocks >> lower for lower in range(level))


def _store(
    summaries: jax.Array, new: jax.Array, b: jax.Array, block: jax.Array, num_blocks: int
) -> jax.Array:
    for level, blocks_per_unit in enumerate(_BLOCKS_PER_UNIT):
        row = _level_offset(level, num_blocks) + block // blocks_per_unit
        old = jax.lax.dynamic_slice(summaries, (b, 0, row, 0, 0), new.shape)
        folded = jnp.concatenate(
            [jnp.minimum(old, new)[..., :1, :], jnp.maximum(old, new)[..., 1:, :]], axis=3
        )
        folded = jnp.where(block % blocks_per_unit == 0, new, folded)
        summaries = jax.lax.dynamic_update_slice(summaries, folded, (b, 0, row, 0, 0))
    return summaries


def _requantise(summaries: jax.Array, flush: Flush, counts: jax.Array) -> jax.Array:
    _, kv_heads, rows, _, head_dim = summaries.shape
    tile_rows = min(_TILE_ROWS, rows)
    # An int8 shifted right by 7 has only its sign left, so no shift is ever wider than its integer.
    shift = jnp.minimum(flush.shift, 7)
    grew = (counts > 0) & (flush.first_block > 0) & (shift > 0).any(axis=(1, 2))

    def requantise_tile(b: jax.Array, start: jax.Array, summaries: jax.Array) -> jax.Array:
        # The last tile overlaps the one before it: rows are shifted once, where they are new.
        place = jnp.minimum(start, rows - tile_rows)
        is_new = place + jnp.arange(tile_rows) >= start
        at = (b, 0, place, 0, 0)
        old = jax.lax.dynamic_slice(summaries, at, (1, kv_heads, tile_rows, 2, head_dim))
        wide = old.astype(jnp.int32)
        by = jnp.where(is_new[None, :, None], shift[b][:, None, :], 0)
        low, high = wide[0, :, :, 0] >> by, -((-wide[0, :, :, 1]) >> by)
        new = jnp.stack([low, high], axis=2)[None].astype(jnp.int8)
        return jax.lax.dynamic_update_slice(summaries, new, at)

    return for_each_tile(jnp.where(grew, rows, 0), tile_rows, requantise_tile, summaries)
