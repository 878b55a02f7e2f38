"""Appending tokens to one layer: what leaves the window goes to the host, the rest stays.

Both ways into the cache, decode (one token, written by collect) and prefill (a chunk, written at
once), use the same pieces. Axes: B batch, K KV heads, T new tokens, H head size.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import host_ops
import pallas_kernels
from fluxion_jax.cache.host_kv import HostKV
from fluxion_jax.cache.layout import BLOCK_TOKENS, host_tokens
from fluxion_jax.cache.sketch import sketch_blocks
from fluxion_jax.cache.stacked import first_row_in, on_layer
from fluxion_jax.cache.summaries import summarise_blocks
from fluxion_jax.cache.window import leaving_blocks, num_leaving, write_chunk
from fluxion_jax.errors import refused_by_name
from fluxion_jax.jitting import jit
from fluxion_jax.sharded import on_shards
from pallas_kernels.compat import target_platform


def make_flush(
    cache: HostKV, index: int, k_chunk: jax.Array, v_chunk: jax.Array, count: jax.Array
) -> tuple[host_ops.Flush, jax.Array]:
    """Prepares the blocks that `count` new tokens push out of one layer's window.

    Args:
      cache: the cache before these tokens; its window must not hold them yet.
      index: position among the global layers.
      k_chunk: `[B, K, T, H]`.
      v_chunk: likewise.
      count: int32 `[B]`, how many of the `T` tokens count.

    Returns:
      The flush, and the layer's new exponents int32 `[B, K, H]`.
    """
    layout, lengths = cache.layout, cache.lengths
    k_blocks = leaving_blocks(layout, cache.window_k[index], k_chunk, lengths, count)
    v_blocks = leaving_blocks(layout, cache.window_v[index], v_chunk, lengths, count)
    num_blocks = num_leaving(layout, lengths, count)
    summaries, exponents, shift = summarise_blocks(k_blocks, num_blocks, cache.exponents[index])
    first_block = host_tokens(layout, lengths) // BLOCK_TOKENS
    flush = host_ops.Flush(k_blocks, v_blocks, summaries, shift, first_block, num_blocks)
    return flush, exponents


def sketch_flush(cache: HostKV, index: int, flush: host_ops.Flush) -> HostKV:
    """Takes leaving blocks into the layer's sketch, if the cache keeps one."""
    if not cache.sketch:
        return cache
    sketch = sketch_blocks(cache.sketch[index], flush, cache.num_host_blocks)
    return with_layer(cache, index, sketch=sketch)


def with_layer(cache: HostKV, index: int, **layer: Any) -> HostKV:
    """Replaces what belongs to one layer, named by the cache's fields."""

    def put(arrays: tuple[Any, ...], new: Any) -> tuple[Any, ...]:
        return (*arrays[:index], new, *arrays[index + 1 :])

    return cache.replace(**{name: put(getattr(cache, name), x) for name, x in layer.items()})


@refused_by_name()
def append_chunk(
    cache: HostKV,
    index: int,
    k_chunk: jax.Array,
    v_chunk: jax.Array,
    count: jax.Array,
    after: jax.Array,
    implementation: host_ops.Implementation = None,
) -> HostKV:
    """Appends a chunk to one global layer; `cache.advance` then makes it part of the sequence.

    Args:
      cache: the cache before the chunk.
      index: position among the global layers.
      k_chunk: `[B, K, T, H]`, after RoPE.
      v_chunk: likewise.
      count: int32 `[B]`, tokens that count; 0 leaves a row as it is.
      after: any small array that every read of the old cache leads to. It orders the write after
        them; without that order XLA would copy the whole cache.
      implementation: which host operations to use.

    Raises:
      UnsupportedError: they cannot be used here.
    """
    if cache.num_host_blocks == 0:
        return _write_window(cache, index, k_chunk, v_chunk, count)
    flush, exponents = make_flush(cache, index, k_chunk, v_chunk, count)
    on_host = cache.layout.summaries == "host"
    k, v, summaries, status = host_ops.append(
        cache.k[index],
        cache.v[index],
        cache.summaries[index] if on_host else None,
        flush,
        after=(after,),
        first_row=cache.first_row,
        implementation=implementation,
    )
    # After an error nothing was written, so the scales must stay as they are too.
    succeeded = status[0] == 0
    exponents = jnp.where(succeeded, exponents, cache.exponents[index])
    if summaries is None:
        summaries = cache.summaries[index]
        summaries = write_summaries(summaries, flush, status, first_row_in(cache, summaries))
    cache = with_layer(cache, index, k=k, v=v, summaries=summaries, exponents=exponents)
    cache = sketch_flush(cache, index, flush)
    cache = _write_window(cache, index, k_chunk, v_chunk, count)
    return cache.replace(status=cache.status | status)


def write_summaries(
    summaries: jax.Array,
    flush: host_ops.Flush,
    status: jax.Array,
    first_row: jax.Array | None = None,
) -> jax.Array:
    """Writes a flush's summaries into those of a layer `[B, K, U, 2, H]` kept on the device.

    With a status other than 0 the cache was not written either, and the summaries stay. On a GPU
    they may be those of several layers, of which `first_row` names one.
    """
    if target_platform() == "gpu":
        return pallas_kernels.update_summaries(summaries, *flush[2:], status, first_row)
    succeeded = status[0] == 0
    flush = flush._replace(
        num_blocks=jnp.where(succeeded, flush.num_blocks, 0),
        shift=jnp.where(succeeded, flush.shift, 0),
    )
    return host_ops.write_summaries(summaries, flush)


def _write_window(
    cache: HostKV, index: int, k_chunk: jax.Array, v_chunk: jax.Array, count: jax.Array
) -> HostKV:
    layout, lengths = cache.layout, cache.lengths
    return with_layer(
        cache,
        index,
        window_k=write_chunk(layout, cache.window_k[index], k_chunk, lengths, count),
        window_v=write_chunk(layout, cache.window_v[index], v_chunk, lengths, count),
    )


def append_all(
    cache: HostKV, k: tuple[jax.Array, ...], v: tuple[jax.Array, ...], lengths: np.ndarray
) -> HostKV:
    """Appends `[B, S, K, H]` keys and values of every layer to a cache of global layers."""
    cache = _append_all(cache, k, v, jnp.asarray(lengths, jnp.int32))
    cache.check()
    return cache


@jit
def _append_all(
    cache: HostKV, k: tuple[jax.Array, ...], v: tuple[jax.Array, ...], count: jax.Array
) -> HostKV:
    def append(cache: HostKV, by_head: Any, count: Any) -> tuple[None, HostKV]:
        half = len(by_head) // 2
        for index, (layer_k, layer_v) in enumerate(
            zip(by_head[:half], by_head[half:], strict=True)
        ):
            k_chunk, v_chunk = (
                jnp.swapaxes(x, 1, 2).astype(cache.layout.jax_dtype) for x in (layer_k, layer_v)
            )
            if cache.stacked:
                cache = _append_to_stacked(cache, index, k_chunk, v_chunk, count)
            else:
                cache = append_chunk(cache, index, k_chunk, v_chunk, count, after=count)
        return None, cache

    if cache.placement is None:
        _, cache = append(cache, (*k, *v), count)
    else:
        _, cache = on_shards(append, cache, (*k, *v), count, head_axis=2, results=None)
    return cache.advance(count)


def _append_to_stacked(
    cache: HostKV, index: int, k_chunk: jax.Array, v_chunk: jax.Array, count: jax.Array
) -> HostKV:
    def append(one: HostKV) -> tuple[None, HostKV]:
        return None, append_chunk(one, 0, k_chunk, v_chunk, count, after=count)

    return on_layer(append, cache, cache.layout.global_layers[index])[1]
