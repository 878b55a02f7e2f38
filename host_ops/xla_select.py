"""Scoring and selection of units for the XLA tier."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from host_ops.types import Work
from host_ops.xla_tiles import for_each_tile, keep_in_loop

_TILE_UNITS = 512
# |score| <= 256 * 127 * 127 < 2**23, so 24 halvings of this interval find any threshold.
_SCORE_BOUND = 1 << 23


def units_of(granularity: jax.Array, host_blocks: jax.Array) -> jax.Array:
    """Selectable units int32 `[B, K]`; the last one may be partial."""
    blocks_per_unit = granularity // 16
    return (host_blocks[:, None] + blocks_per_unit - 1) // blocks_per_unit


def score_units(work: Work, summaries: jax.Array, units: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Upper bounds of the scores of the first `units[b, k]` units of every task.

    Args:
      work: the step's work.
      summaries: int8 `[B, K, U, 2, H]`, typed as device memory.
      units: int32 `[B, K]`, how many to score.

    Returns:
      float32 `[B, K, G, P']` with `P' >= P`, exact integers, 0 where nothing was scored; and the
      summaries, which writers must use so that they are ordered after the reads.
    """
    batch, num_heads, head_dim = work.q8.shape
    kv_heads, rows = summaries.shape[1:3]
    group = num_heads // kv_heads
    num_blocks = rows * 8 // 15
    padded = -(-num_blocks // _TILE_UNITS) * _TILE_UNITS

    # sum max(q*lo, q*hi) = relu(q)*hi - relu(-q)*lo, one matmul over [lo, hi]. In float32 it is
    # exact in any order, because every partial sum is an integer below 2**24.
    q8 = work.q8.astype(jnp.float32).reshape(batch * kv_heads, group, head_dim)
    signed = jnp.concatenate([jnp.minimum(q8, 0.0), jnp.maximum(q8, 0.0)], axis=-1)
    g = work.granularity
    level = jnp.where(g == 16, 0, jnp.where(g == 32, 1, jnp.where(g == 64, 2, 3)))
    offsets = num_blocks * 2 - (num_blocks * 2 >> level)

    def score_tile(
        task: jax.Array, start: jax.Array, carry: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        scores, summaries = carry
        b, kv = task // kv_heads, task % kv_heads
        unit = jnp.minimum(start + jnp.arange(_TILE_UNITS), units[b, kv] - 1)
        tile = summaries[b, kv, offsets[b, kv] + unit].astype(jnp.float32)
        tile_scores = jnp.matmul(
            signed[task], tile.reshape(_TILE_UNITS, 2 * head_dim).T, precision="highest"
        )
        scores = jax.lax.dynamic_update_slice(scores, tile_scores[None], (task, 0, start))
        return scores, keep_in_loop(summaries)

    scores = jnp.zeros((batch * kv_heads, group, padded), jnp.float32)
    scores, summaries = for_each_tile(
        units.reshape(-1), _TILE_UNITS, score_tile, (scores, summaries)
    )
    return scores.reshape(batch, kv_heads, group, padded), summaries


def select_blocks(work: Work, scores: jax.Array, units: jax.Array, num_blocks: int) -> jax.Array:
    """The best units of every head, as blocks; ties go to the lowest unit.

    Args:
      work: the step's work.
      scores: float32 `[B, K, G, P']` of `score_units`.
      units: int32 `[B, K]`, selectable units.
      num_blocks: P.

    Returns:
      bool `[B, K, G, P]`.
    """
    batch, kv_heads, group, width = scores.shape
    wanted = work.k_units.reshape(batch, kv_heads, group)
    shared = work.shared[:, :, None] != 0
    wanted = jnp.where(shared, wanted.max(axis=2, keepdims=True), wanted)
    wanted = jnp.clip(wanted, 0, units[:, :, None])[..., None]
    scores = jnp.where(shared[..., None], scores.max(axis=2, keepdims=True), scores)
    scores = scores.astype(jnp.int32)
    is_unit = jnp.arange(width) < units[:, :, None, None]

    def count(chosen: jax.Array) -> jax.Array:
        return jnp.sum(chosen & is_unit, axis=-1, keepdims=True, dtype=jnp.int32)

    def halve(_: int, interval: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = interval
        middle = (low + high) // 2
        enough = count(scores >= middle) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    # The wanted-th best score is the largest threshold that at least `wanted` units reach.
    low = jnp.full_like(wanted, -_SCORE_BOUND)
    threshold, _ = jax.lax.fori_loop(0, 24, halve, (low, -low))
    above = (scores > threshold) & is_unit
    tied = (scores == threshold) & is_unit
    rank = jnp.cumsum(tied, axis=-1, dtype=jnp.int32)
    chosen = (above | (tied & (rank <= wanted - count(above)))) & (wanted > 0)

    block = jnp.arange(num_blocks)
    unit = block // (work.granularity[:, :, None] // 16)
    blocks = jnp.take_along_axis(chosen, unit[:, :, None, :], axis=-1)
    return blocks & (block < work.host_blocks[:, None, None, None])


def pack(chosen: jax.Array) -> jax.Array:
    """Packs bool `[..., P]` into uint32 `[..., W]`; bit i of word w is block 32 w + i."""
    pad = -chosen.shape[-1] % 32
    chosen = jnp.pad(chosen, [(0, 0)] * (chosen.ndim - 1) + [(0, pad)])
    bits = chosen.reshape(*chosen.shape[:-1], -1, 32).astype(jnp.uint32)
    return jnp.sum(bits << jnp.arange(32, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


def unpack(bitmap: jax.Array, num_blocks: int) -> jax.Array:
    """Unpacks uint32 `[..., W]` into bool `[..., num_blocks]`."""
    bits = (bitmap[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits.astype(bool).reshape(*bitmap.shape[:-1], -1)[..., :num_blocks]
