"""The resident window: sinks and recent tokens, on the device, always attended densely.

Slots 0 .. sinks-1 hold the first tokens; the rest is a ring in which stream token `s` (position
minus the sinks) lives in slot `s mod R`. The window and the selectable host blocks partition the
sequence exactly, after every step.

Axes: B batch, K KV heads, T new tokens, H head size, R ring slots, M leaving blocks, C = 16.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fluxion_jax.cache.layout import BLOCK_TOKENS, KVLayout, host_tokens


def _ring_stream_index(layout: KVLayout, lengths: jax.Array) -> jax.Array:
    """Stream index of the newest token in each ring slot, int32 `[B, R]`; negative if none."""
    newest = (lengths - layout.sink_tokens - 1)[:, None]
    slots = jnp.arange(layout.ring_tokens)
    return newest - (newest - slots) % layout.ring_tokens


def window_mask(layout: KVLayout, lengths: jax.Array, first_stream: jax.Array) -> jax.Array:
    """Which slots hold tokens that the window answers for.

    Args:
      layout: the cache's layout.
      lengths: int32 `[B]`, tokens written so far.
      first_stream: int32 `[B]`, the first stream token that is not selectable on the host.

    Returns:
      bool `[B, sinks + R]`.
    """
    sinks = jnp.arange(layout.sink_tokens) < lengths[:, None]
    stream = _ring_stream_index(layout, lengths)
    ring = (stream >= jnp.maximum(first_stream, 0)[:, None]) & (stream >= 0)
    return jnp.concatenate([sinks, ring], axis=1)


def window_positions(layout: KVLayout, lengths: jax.Array, mask: jax.Array) -> jax.Array:
    """Position of the token in each slot, int32 `[B, sinks + R]`; -1 where the mask is false."""
    batch = lengths.shape[0]
    sinks = jnp.broadcast_to(jnp.arange(layout.sink_tokens), (batch, layout.sink_tokens))
    ring = _ring_stream_index(layout, lengths) + layout.sink_tokens
    return jnp.where(mask, jnp.concatenate([sinks, ring], axis=1), -1)


def write_token(
    layout: KVLayout, window: jax.Array, new: jax.Array, lengths: jax.Array, active: jax.Array
) -> jax.Array:
    """Writes one token per active row into the window `[B, K, sinks + R, H]`, in place if donated.

    Args:
      layout: the cache's layout.
      window: `[B, K, sinks + R, H]`.
      new: `[B, K, H]`.
      lengths: int32 `[B]`, tokens before this one.
      active: bool `[B]`; other rows stay as they are.
    """
    sinks = layout.sink_tokens
    slot = jnp.where(lengths < sinks, lengths, sinks + (lengths - sinks) % layout.ring_tokens)
    slot = jnp.where(active, slot, layout.window_tokens)
    rows = jnp.arange(window.shape[0])
    return window.at[rows, :, slot].set(new.astype(window.dtype), mode="drop")


def write_chunk(
    layout: KVLayout, window: jax.Array, chunk: jax.Array, lengths: jax.Array, count: jax.Array
) -> jax.Array:
    """Writes the first `count[b]` of `T` new tokens of each row; only the newest survive.

    Args:
      layout: the cache's layout.
      window: `[B, K, sinks + R, H]`.
      chunk: `[B, K, T, H]`.
      lengths: int32 `[B]`, tokens before the chunk.
      count: int32 `[B]`, 0 to `T`.
    """
    sink_position = jnp.broadcast_to(
        jnp.arange(layout.sink_tokens), (lengths.shape[0], layout.sink_tokens)
    )
    ring_position = _ring_stream_index(layout, lengths + count) + layout.sink_tokens
    # A negative stream index would name a sink: such a ring slot is simply not written yet.
    ring_position = jnp.where(ring_position < layout.sink_tokens, -1, ring_position)
    offset = jnp.concatenate([sink_position, ring_position], axis=1) - lengths[:, None]
    is_new = (offset >= 0) & (offset < count[:, None])
    taken = _take_tokens(chunk, jnp.clip(offset, 0, chunk.shape[2] - 1))
    return jnp.where(is_new[:, None, :, None], taken.astype(window.dtype), window)


def leaving_blocks(
    layout: KVLayout, window: jax.Array, chunk: jax.Array, lengths: jax.Array, count: jax.Array
) -> jax.Array:
    """Collects the blocks that `count` new tokens push out of the window.

    Args:
      layout: the cache's layout.
      window: `[B, K, sinks + R, H]`, before the chunk is written.
      chunk: `[B, K, T, H]`.
      lengths: int32 `[B]`, tokens before the chunk.
      count: int32 `[B]`, 0 to `T`.

    Returns:
      `[B, K, M, C, H]` with `M = ceil(T / 16)`; the first `num_leaving` of them are meant.
    """
    new_tokens = chunk.shape[2]
    num_blocks = -(-new_tokens // BLOCK_TOKENS)
    first = host_tokens(layout, lengths)
    stream = first[:, None] + jnp.arange(num_blocks * BLOCK_TOKENS)
    offset = stream + layout.sink_tokens - lengths[:, None]
    old = _take_tokens(window, layout.sink_tokens + stream % layout.ring_tokens)
    new = _take_tokens(chunk, jnp.clip(offset, 0, new_tokens - 1)).astype(window.dtype)
    tokens = jnp.where((offset >= 0)[:, None, :, None], new, old)
    batch, kv_heads, _, head_dim = window.shape
    return tokens.reshape(batch, kv_heads, num_blocks, BLOCK_TOKENS, head_dim)


def num_leaving(layout: KVLayout, lengths: jax.Array, count: jax.Array) -> jax.Array:
    """How many blocks `count` new tokens push out of the window; int32 `[B]`."""
    return (host_tokens(layout, lengths + count) - host_tokens(layout, lengths)) // BLOCK_TOKENS


def _take_tokens(tokens: jax.Array, index: jax.Array) -> jax.Array:
    """Gathers `[B, K, S, H]` at `[B, X]` along the token axis: `[B, K, X, H]`."""
    return jnp.take_along_axis(tokens, index[:, None, :, None], axis=2)
