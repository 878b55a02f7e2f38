"""Attention of sliding-window layers: their keys fit on the device and never leave it.

Token `p` lives in slot `p mod W` of a ring of `W` tokens. Axes: B batch, N query heads, K KV heads,
T new tokens, W window, H head size.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels
from fluxion_jax.cache.host_kv import HostKV
from fluxion_jax.cache.stacked import on_layer
from fluxion_jax.chunk_attention import attend
from fluxion_jax.sharded import on_shards
from fluxion_jax.state import merge


def sliding_decode_attention(
    q: jax.Array,
    k_new: jax.Array,
    v_new: jax.Array,
    cache: HostKV,
    layer: int | jax.Array,
    window: int,
    *,
    scale: float,
) -> tuple[jax.Array, HostKV]:
    """Attention of one new token over the last `window` tokens, itself included.

    Args:
      q: `[B, N, H]` after RoPE, not scaled.
      k_new: `[B, K, H]`.
      v_new: `[B, K, H]`.
      cache: the cache before the new token.
      layer: index of the layer in the model; must be a sliding one.
      window: tokens seen.
      scale: factor on the scores.

    Returns:
      `(out [B, N, H]` in q's dtype, the cache with the token in it`)`.
    """
    if cache.placement is not None:

        def share(cache: HostKV, by_head: Any, _: Any) -> tuple[Any, HostKV]:
            q, k_new, v_new = by_head
            return sliding_decode_attention(q, k_new, v_new, cache, layer, window, scale=scale)

        return on_shards(share, cache, (q, k_new, v_new), (), head_axis=1, results=1)
    if cache.stacked:
        return on_layer(
            lambda one: sliding_decode_attention(q, k_new, v_new, one, layer, window, scale=scale),
            cache,
            layer,
            sliding=True,
        )
    index = cache.sliding_index(layer)
    active = cache.has_room(1)
    slots = cache.sliding_k[index].shape[2]
    slot = jnp.where(active, cache.lengths % slots, slots)
    rows = jnp.arange(cache.batch)
    k, v = (
        ring[index].at[rows, :, slot].set(new.astype(cache.layout.jax_dtype), mode="drop")
        for ring, new in ((cache.sliding_k, k_new), (cache.sliding_v, v_new))
    )
    position = _ring_positions(slots, cache.lengths + 1)
    mask = (position > (cache.lengths - window)[:, None]) & (position >= 0) & active[:, None]
    out, _ = pallas_kernels.window_attention(q.astype(jnp.float32), k, v, mask, scale=scale)
    return out.astype(q.dtype), _with_ring(cache, index, k, v)


def sliding_prefill_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    count: jax.Array,
    cache: HostKV,
    layer: int | jax.Array,
    window: int,
    *,
    scale: float,
) -> tuple[jax.Array, HostKV]:
    """Attention of a chunk over the ring and itself.

    Args:
      q: `[B, T, N, H]` after RoPE, not scaled.
      k: `[B, T, K, H]`.
      v: `[B, T, K, H]`.
      count: int32 `[B]`, tokens of the chunk that count.
      cache: the cache before the chunk.
      layer: index of the layer in the model; must be a sliding one.
      window: tokens seen by a query, itself included.
      scale: factor on the scores.

    Returns:
      `(out [B, T, N, H]` in q's dtype, the cache with the chunk in it`)`.
    """
    if cache.placement is not None:

        def share(cache: HostKV, by_head: Any, count: Any) -> tuple[Any, HostKV]:
            q, k, v = by_head
            return sliding_prefill_attention(q, k, v, count, cache, layer, window, scale=scale)

        return on_shards(share, cache, (q, k, v), count, head_axis=2, results=2)
    if cache.stacked:
        return on_layer(
            lambda one: sliding_prefill_attention(q, k, v, count, one, layer, window, scale=scale),
            cache,
            layer,
            sliding=True,
        )
    index = cache.sliding_index(layer)
    count = jnp.where(cache.has_room(count), count, 0)
    k, v = (jnp.swapaxes(x, 1, 2).astype(cache.layout.jax_dtype) for x in (k, v))
    lengths = cache.lengths
    old_k, old_v = cache.sliding_k[index], cache.sliding_v[index]
    slots, tokens = old_k.shape[2], k.shape[2]

    old_position = _ring_positions(slots, lengths)
    query_position = lengths[:, None] + jnp.arange(tokens)
    seen = old_position[:, None, :] > query_position[:, :, None] - window
    old_mask = seen & (old_position >= 0)[:, None, :]
    step = jnp.arange(tokens)
    causal = (step[None, :] <= step[:, None]) & (step[None, :] > step[:, None] - window)
    new_mask = causal[None] & (step < count[:, None])[:, None, :]
    state = merge(attend(q, old_k, old_v, old_mask, scale), attend(q, k, v, new_mask, scale))

    after = _ring_positions(slots, lengths + count)
    offset = after - lengths[:, None]
    is_new = (offset >= 0) & (after >= 0)
    take = jnp.clip(offset, 0, tokens - 1)[:, None, :, None]
    ring_k, ring_v = (
        jnp.where(is_new[:, None, :, None], jnp.take_along_axis(new, take, axis=2), old)
        for new, old in ((k, old_k), (v, old_v))
    )
    return state[0].astype(q.dtype), _with_ring(cache, index, ring_k, ring_v)


def _ring_positions(slots: int, lengths: jax.Array) -> jax.Array:
    """Position of the newest token in each slot, int32 `[B, W]`; negative if none."""
    newest = (lengths - 1)[:, None]
    return newest - (newest - jnp.arange(slots)) % slots


def _with_ring(cache: HostKV, index: int, k: jax.Array, v: jax.Array) -> HostKV:
    sliding_k, sliding_v = list(cache.sliding_k), list(cache.sliding_v)
    sliding_k[index], sliding_v[index] = k, v
    return cache.replace(sliding_k=tuple(sliding_k), sliding_v=tuple(sliding_v))
