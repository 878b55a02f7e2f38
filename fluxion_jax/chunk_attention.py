"""Prefill: reading a prompt into the cache in chunks, layer by layer.

A chunk attends to itself, to the resident window and to the host cache, which is streamed to the
device tile by tile; the parts merge by their log-sum-exps. So the device never holds more of the
cache than one tile of one layer. Axes: B batch, T tokens of a chunk, N query heads, K KV heads,
G = N // K, S keys, H head size.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import host_ops
import pallas_kernels
from fluxion_jax import probes
from fluxion_jax.cache.append import append_chunk, with_layer
from fluxion_jax.cache.host_kv import HostKV
from fluxion_jax.cache.layout import BLOCK_TOKENS, host_tokens
from fluxion_jax.cache.stacked import on_layer
from fluxion_jax.cache.window import leaving_blocks, num_leaving, window_mask
from fluxion_jax.sharded import on_shards
from fluxion_jax.state import AttentionState, merge

# A tile of 1,024 tokens: big enough for the matrix units, and small beside any model's weights.
TILE_BLOCKS = 64


def prefill_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    count: jax.Array,
    cache: HostKV,
    layer: int | jax.Array,
    *,
    scale: float,
    implementation: host_ops.Implementation = None,
) -> tuple[jax.Array, HostKV]:
    """Full causal attention of a chunk over its past and itself; the chunk enters the cache.

    Args:
      q: `[B, T, N, H]`, any float dtype, after RoPE, not scaled.
      k: `[B, T, K, H]`, after RoPE.
      v: `[B, T, K, H]`.
      count: int32 `[B]`, how many of the `T` tokens of each row count.
      cache: the cache before the chunk.
      layer: index of the layer in the model; must be a global one.
      scale: factor on the scores.
      implementation: which host operations write the cache; None for the best available.

    Returns:
      `(out, cache)`: out `[B, T, N, H]` in q's dtype (unspecified behind `count`); the cache with
      this layer's chunk, which counts once `cache.advance(count)` was called.
    """
    if cache.placement is not None:

        def share(cache: HostKV, by_head: Any, count: Any) -> tuple[Any, HostKV]:
            q, k, v = by_head
            return prefill_attention(
                q, k, v, count, cache, layer, scale=scale, implementation=implementation
            )

        return on_shards(share, cache, (q, k, v), count, head_axis=2, results=2)
    if cache.stacked:
        return on_layer(
            lambda one: prefill_attention(
                q, k, v, count, one, layer, scale=scale, implementation=implementation
            ),
            cache,
            layer,
        )
    index = cache.global_index(layer)
    count = jnp.where(cache.has_room(count), count, 0)
    # What later steps will read is what this chunk must see: values rounded to the cache's dtype.
    k, v = (jnp.swapaxes(x, 1, 2).astype(cache.layout.jax_dtype) for x in (k, v))
    step = jnp.arange(q.shape[1])
    causal = (step[None, :] <= step[:, None])[None] & (step < count[:, None])[:, None, :]
    state = attend(q, k, v, causal, scale)

    lengths = cache.lengths
    resident = window_mask(cache.layout, lengths, host_tokens(cache.layout, lengths))
    resident = jnp.broadcast_to(resident[:, None, :], (*q.shape[:2], resident.shape[1]))
    window = attend(q, cache.window_k[index], cache.window_v[index], resident, scale)
    state = merge(state, window)
    probed = probes.start(q, count, cache.num_host_blocks) if cache.sketch else None
    if cache.num_host_blocks:
        state, probed = _attend_host(q, cache, index, count, scale, state, probed)
    if probed is not None:
        probed = _probe_leaving(probed, k, v, count, cache, index, scale)
        sketch = probes.finish(probed, state, cache.sketch[index], lengths, count)
        cache = with_layer(cache, index, sketch=sketch)

    cache = append_chunk(cache, index, k, v, count, after=state[1], implementation=implementation)
    return state[0].astype(q.dtype), cache


def _probe_leaving(
    probed: probes.Probes,
    k: jax.Array,
    v: jax.Array,
    count: jax.Array,
    cache: HostKV,
    index: int,
    scale: float,
) -> probes.Probes:
    """Shows the probes those blocks that leave the window with this chunk."""
    layout, lengths = cache.layout, cache.lengths
    leaving = [
        leaving_blocks(layout, window[index], x, lengths, count)
        for window, x in ((cache.window_k, k), (cache.window_v, v))
    ]
    exists = jnp.arange(leaving[0].shape[2]) < num_leaving(layout, lengths, count)[:, None]
    first = host_tokens(layout, lengths) // BLOCK_TOKENS
    return probes.see_blocks(probed, leaving, first, exists, exists, scale)


def _attend_host(
    q: jax.Array,
    cache: HostKV,
    index: int,
    count: jax.Array,
    scale: float,
    state: AttentionState,
    probed: probes.Probes | None,
) -> tuple[AttentionState, probes.Probes | None]:
    """Streams the selectable part of the host cache through the device, tile by tile."""
    host_blocks = host_tokens(cache.layout, cache.lengths) // BLOCK_TOKENS
    host_blocks = jnp.where(count > 0, host_blocks, 0)
    capacity = cache.num_host_blocks
    tile = min(TILE_BLOCKS, capacity)

    def body(
        i: jax.Array, carry: tuple[AttentionState, probes.Probes | None]
    ) -> tuple[AttentionState, probes.Probes | None]:
        state, probed = carry
        # The last tile is moved back to stay inside the array; what it repeats is masked.
        wanted = i * tile
        first = jnp.minimum(wanted, capacity - tile)
        blocks = [fetch_blocks(x[index], first, tile, cache) for x in (cache.k, cache.v)]
        k, v = (x.reshape(*x.shape[:2], -1, q.shape[-1]) for x in blocks)
        block = first + jnp.arange(tile)
        exists = block < host_blocks[:, None]
        fresh = exists & (block >= wanted)
        mask = jnp.repeat(fresh, BLOCK_TOKENS, axis=1)
        mask = jnp.broadcast_to(mask[:, None, :], (*q.shape[:2], mask.shape[1]))
        if probed is not None:
            probed = probes.see_blocks(probed, blocks, first, exists, fresh, scale)
        return merge(state, attend(q, k, v, mask, scale)), probed

    return jax.lax.fori_loop(0, -(-host_blocks.max() // tile), body, (state, probed))


def fetch_blocks(
    host: jax.Array, first: jax.Array, num_blocks: int, cache: HostKV | None = None
) -> jax.Array:
    """Copies host blocks to the device.

    Args:
      host: `[B, K, P, C, H]` in pinned host memory.
      first: int32 scalar, the first block.
      num_blocks: how many, a Python int.
      cache: the cache, if it may be a layer of a stacked one; then `host` has the rows of all.

    Returns:
      `[B, K, num_blocks, C, H]` in device memory.
    """
    rows = None
    if cache is not None and cache.first_row is not None:
        rows = (cache.first_row, cache.batch)
    return pallas_kernels.copy_blocks(
        host_ops.retag(host, host_ops.DEVICE), first, num_blocks, rows=rows
    )


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float
) -> AttentionState:
    """Dense masked attention of a chunk.

    Args:
      q: `[B, T, N, H]`.
      k: `[B, K, S, H]`.
      v: `[B, K, S, H]`.
      mask: bool `[B, T, S]`.
      scale: factor on the scores.

    Returns:
      The attention state: out float32 `[B, T, N, H]`, lse float32 `[B, T, N]`.
    """
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    # bfloat16 and float16 hold each other's values only in float32.
    dtype = jnp.promote_types(q.dtype, k.dtype)
    precision = "highest" if dtype == jnp.float32 else None
    # A weight of zero does not silence a NaN, and a slot may hold what no sequence ever counted.
    v = jnp.where(mask.any(axis=1)[:, None, :, None], v, 0)
    grouped = q.reshape(batch, tokens, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum(
        "btkgh,bksh->bkgts",
        grouped.astype(dtype),
        k.astype(dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    scores = jnp.where(mask[:, None, None], scores * scale, -jnp.inf)
    peak = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isneginf(peak), 0.0, peak))
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum(
        "bkgts,bksh->bkgth",
        weights.astype(dtype),
        v.astype(dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    out = out / jnp.where(total > 0, total, 1.0)
    lse = (jnp.log(total) + peak)[..., 0]
    out = jnp.moveaxis(out, 3, 1).reshape(batch, tokens, heads, head_dim)
    lse = jnp.moveaxis(lse, 3, 1).reshape(batch, tokens, heads)
    return AttentionState(out, lse)
