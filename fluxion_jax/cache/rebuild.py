"""Rebuilding the summaries of a cache from its keys, after a chunk that did not count.

A chunk that fails late, in its logits, has by then grown scales and folded summaries with keys that
never became part of a sequence. The bounds are still bounds, but loose ones.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import host_ops
from fluxion_jax.cache.append import with_layer, write_summaries
from fluxion_jax.cache.host_kv import HostKV
from fluxion_jax.cache.layout import BLOCK_TOKENS, host_tokens
from fluxion_jax.cache.stacked import first_row_in, on_layer
from fluxion_jax.cache.summaries import MIN_EXPONENT, summarise_blocks
from fluxion_jax.chunk_attention import TILE_BLOCKS, fetch_blocks
from fluxion_jax.errors import refused_by_name
from fluxion_jax.jitting import jit
from fluxion_jax.sharded import on_shards


@refused_by_name()
def rebuild_summaries(cache: HostKV, implementation: host_ops.Implementation = None) -> HostKV:
    """Makes exponents and summaries what they would be if only the cached tokens had ever come.

    Args:
      cache: consumed; keys and values stay as they are, and so does its status.
      implementation: which host operations to use.

    Raises:
      UnsupportedError: they cannot be used here.
    """
    return _rebuild(cache, implementation) if cache.num_host_blocks else cache


def _rebuild_layers(cache: HostKV, implementation: host_ops.Implementation) -> HostKV:
    def rebuild(cache: HostKV, _: Any, __: Any) -> tuple[None, HostKV]:
        for index, layer in enumerate(cache.layout.global_layers):
            if cache.stacked:
                _, cache = on_layer(
                    lambda one: (None, _rebuild_layer(one, 0, implementation)), cache, layer
                )
            else:
                cache = _rebuild_layer(cache, index, implementation)
        return None, cache

    if cache.placement is None:
        return rebuild(cache, (), ())[1]
    return on_shards(rebuild, cache, (), (), head_axis=0, results=None)[1]


_rebuild = jit(_rebuild_layers, static_argnames=("implementation",))


def _rebuild_layer(cache: HostKV, index: int, implementation: host_ops.Implementation) -> HostKV:
    """Writes each tile of blocks back to where it is, this time with fresh summaries."""
    on_host = cache.layout.summaries == "host"
    capacity = cache.num_host_blocks
    tile = min(TILE_BLOCKS, capacity)
    blocks = host_tokens(cache.layout, cache.lengths) // BLOCK_TOKENS
    fresh = jnp.full_like(cache.exponents[index], MIN_EXPONENT)

    def write(i: jax.Array, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        k, v, summaries, exponents, status = arrays
        # The last tile is moved back to stay inside the array; what it repeats comes out the same.
        first = jnp.minimum(i * tile, capacity - tile)
        count = jnp.clip(blocks - first, 0, tile)
        k_blocks, v_blocks = (fetch_blocks(x, first, tile, cache) for x in (k, v))
        written, exponents, shift = summarise_blocks(k_blocks, count, exponents)
        place = jnp.broadcast_to(first, count.shape).astype(jnp.int32)
        flush = host_ops.Flush(k_blocks, v_blocks, written, shift, place, count)
        k, v, kept, failed = host_ops.append(
            k,
            v,
            summaries if on_host else None,
            flush,
            after=(exponents,),
            first_row=cache.first_row,
            implementation=implementation,
        )
        if kept is None:
            kept = write_summaries(summaries, flush, failed, first_row_in(cache, summaries))
        return k, v, kept, exponents, status | failed

    arrays = (cache.k[index], cache.v[index], cache.summaries[index], fresh, cache.status)
    k, v, summaries, exponents, status = jax.lax.fori_loop(
        0, -(-blocks.max() // tile), write, arrays
    )
    cache = with_layer(cache, index, k=k, v=v, summaries=summaries, exponents=exponents)
    return cache.replace(status=status)
