"""Block-sparse attention for the XLA tier: tiles of selected blocks, gathered in one loop."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from host_ops.xla_tiles import for_each_tile, keep_in_loop

_TILE_BLOCKS = 32


class _Partial(NamedTuple):
    """Running softmax of every task: maximum, normaliser `[tasks, G]`, sum `[tasks, G, H]`."""

    top: jax.Array
    norm: jax.Array
    acc: jax.Array


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, chosen: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Attends, every query head to its own blocks; a block is read once for its whole group.

    Args:
      q: float32 `[B, N, H]`, not scaled.
      k: `[B, K, P, C, H]`, typed as device memory.
      v: likewise.
      chosen: bool `[B, K, G, P]`.
      scale: factor of the scores.

    Returns:
      `(out float32 [B, N, H], lse float32 [B, N], k, v)`. Writes to the cache must use the `k`
      and `v` returned, which are ordered after all reads: with the ones passed in XLA would
      keep a copy for the readers.
    """
    batch, kv_heads, group, num_blocks = chosen.shape
    tasks, head_dim = batch * kv_heads, q.shape[-1]
    q = q.reshape(tasks, group, head_dim)
    chosen = chosen.reshape(tasks, group, num_blocks)
    counts, block_ids = _compact(chosen.any(axis=1))

    def add_tile(
        task: jax.Array, start: jax.Array, carry: tuple[_Partial, jax.Array, jax.Array]
    ) -> tuple[_Partial, jax.Array, jax.Array]:
        partial, k, v = carry
        ids = jax.lax.dynamic_slice(block_ids, (task, start), (1, _TILE_BLOCKS))[0]
        valid = start + jnp.arange(_TILE_BLOCKS) < counts[task]
        mask = chosen[task][:, ids] & valid
        keys = k[task // kv_heads, task % kv_heads, ids].astype(jnp.float32)
        values = v[task // kv_heads, task % kv_heads, ids].astype(jnp.float32)
        mine = jax.tree.map(lambda x: x[task], partial)
        mine = _add(mine, q[task] * scale, keys, values, mask)
        partial = jax.tree.map(lambda x, y: x.at[task].set(y), partial, mine)
        return partial, keep_in_loop(k), keep_in_loop(v)

    empty = _Partial(
        top=jnp.full((tasks, group), -jnp.inf),
        norm=jnp.zeros((tasks, group)),
        acc=jnp.zeros((tasks, group, head_dim)),
    )
    partial, k, v = for_each_tile(counts, _TILE_BLOCKS, add_tile, (empty, k, v))
    is_empty = partial.norm == 0
    out = partial.acc / jnp.where(is_empty, 1.0, partial.norm)[..., None]
    lse = jnp.where(is_empty, -jnp.inf, partial.top + jnp.log(partial.norm))
    heads = kv_heads * group
    return out.reshape(batch, heads, head_dim), lse.reshape(batch, heads), k, v


def _compact(union: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Ids of the set entries of bool `[tasks, P]`: counts, and ids in order, padded by zeros."""
    tasks, num_blocks = union.shape
    place = jnp.where(union, jnp.cumsum(union, axis=1) - 1, num_blocks + _TILE_BLOCKS)
    ids = jnp.zeros((tasks, num_blocks + _TILE_BLOCKS), jnp.int32)
    block = jnp.broadcast_to(jnp.arange(num_blocks, dtype=jnp.int32), union.shape)
    ids = ids.at[jnp.arange(tasks)[:, None], place].set(block, mode="drop")
    return union.sum(axis=1, dtype=jnp.int32), ids


def _add(
    partial: _Partial, q: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array
) -> _Partial:
    """Adds one tile `[blocks, C, H]` for all heads of a group; `mask` is bool `[G, blocks]`."""
    scores = jnp.einsum("gh,pch->gpc", q, keys, precision="highest")
    mask = jnp.broadcast_to(mask[..., None], scores.shape)
    scores = jnp.where(mask, scores, -jnp.inf)
    top = jnp.maximum(partial.top, scores.max(axis=(1, 2)))
    pivot = jnp.where(top == -jnp.inf, 0.0, top)
    decay = jnp.exp(partial.top - pivot)
    weights = jnp.where(mask, jnp.exp(scores - pivot[:, None, None]), 0.0)

    def fast() -> jax.Array:
        return jnp.einsum("gpc,pch->gh", weights, values, precision="highest")

    def careful() -> jax.Array:
        # 0 * NaN is NaN: a value that one head selected must not reach the others.
        terms = jnp.where(mask[..., None], weights[..., None] * values, 0.0)
        return terms.sum(axis=(1, 2))

    tile = jax.lax.cond(jnp.isfinite(values).all(), fast, careful)
    return _Partial(
        top=top,
        norm=partial.norm * decay + weights.sum(axis=(1, 2)),
        acc=partial.acc * decay[:, None] + tile,
    )
