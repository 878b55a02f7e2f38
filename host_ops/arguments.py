"""Checks of shapes and dtypes, made once for every implementation while tracing."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from host_ops.types import Flush, Tick, Work

BLOCK_TOKENS = 16
_CACHE_DTYPES = tuple(map(jnp.dtype, (jnp.bfloat16, jnp.float16, jnp.float32)))


def check_cache(k: jax.Array, v: jax.Array, summaries: jax.Array | None) -> None:
    """Raises ValueError unless the three arrays form a host cache `[B, K, P, 16, H]`."""
    if k.ndim != 5 or k.shape[3] != BLOCK_TOKENS or k.shape[2] % 8 or not k.shape[2]:
        raise ValueError(
            f"k: expected shape [B, K, P, {BLOCK_TOKENS}, H] with P a positive multiple of 8, "
            f"got {k.shape}; allocate whole groups of 8 blocks"
        )
    if k.shape[4] % 8 or not 8 <= k.shape[4] <= 256:
        raise ValueError(
            f"k: expected a head size that is a multiple of 8 up to 256, got {k.shape[4]}; "
            "pad the head with zeros"
        )
    if k.dtype not in _CACHE_DTYPES:
        raise ValueError(
            f"k: expected dtype bfloat16, float16 or float32, got {k.dtype}; cast the cache"
        )
    _expect("v", v, k.shape, k.dtype)
    if summaries is not None:
        batch, kv_heads, num_blocks, _, head_dim = k.shape
        units = num_blocks * 15 // 8
        _expect("summaries", summaries, (batch, kv_heads, units, 2, head_dim), jnp.int8)


def check_work(work: Work, k: jax.Array, summaries: jax.Array | None) -> None:
    """Raises ValueError unless `work` fits a cache that `check_cache` has accepted."""
    batch, kv_heads, num_blocks, _, head_dim = k.shape
    if work.q.ndim != 3 or not work.q.shape[1] or work.q.shape[1] % kv_heads:
        raise ValueError(
            f"work.q: expected shape [B, N, H] with N a positive multiple of {kv_heads} KV heads, "
            f"got {work.q.shape}; flatten the query heads so that head n belongs to n // G"
        )
    heads = work.q.shape[1]
    _expect("work.q", work.q, (batch, heads, head_dim), jnp.float32)
    _expect("work.q8", work.q8, (batch, heads, head_dim), jnp.int8)
    _expect("work.granularity", work.granularity, (batch, kv_heads), jnp.int32)
    _expect("work.k_units", work.k_units, (batch, heads), jnp.int32)
    _expect("work.shared", work.shared, (batch, kv_heads), jnp.int32)
    _expect("work.host_blocks", work.host_blocks, (batch,), jnp.int32)
    _expect("work.boundary", work.boundary, (batch, kv_heads), jnp.int32)
    _expect("work.cancel", work.cancel, (1,), jnp.int32)
    if work.status is not None:
        _expect("work.status", work.status, (1,), jnp.int32)
    if work.bitmap is not None:
        _expect("work.bitmap", work.bitmap, (batch, heads, -(-num_blocks // 32)), jnp.uint32)
    elif summaries is None:
        raise ValueError(
            "expected host summaries or work.bitmap, got neither; "
            "pass the selection as work.bitmap if the summaries are kept on the device"
        )


def check_flush(flush: Flush, k: jax.Array) -> None:
    """Raises ValueError unless `flush` fits a cache that `check_cache` has accepted."""
    batch, kv_heads, _, tokens, head_dim = k.shape
    blocks = flush.k.shape[2] if flush.k.ndim == 5 else 0
    _expect("flush.k", flush.k, (batch, kv_heads, blocks, tokens, head_dim), k.dtype)
    _expect("flush.v", flush.v, (batch, kv_heads, blocks, tokens, head_dim), k.dtype)
    _expect("flush.summaries", flush.summaries, (batch, kv_heads, blocks, 2, head_dim), jnp.int8)
    _expect("flush.shift", flush.shift, (batch, kv_heads, head_dim), jnp.int32)
    _expect("flush.first_block", flush.first_block, (batch,), jnp.int32)
    _expect("flush.num_blocks", flush.num_blocks, (batch,), jnp.int32)


def check_tick(tick: Tick) -> None:
    """Raises ValueError unless `tick` has the type of what `submit` returns."""
    if not isinstance(tick, Tick):
        raise ValueError(
            f"tick: expected a host_ops.Tick, got {type(tick).__name__}; pass what submit returned"
        )
    _expect("tick.slot", tick.slot, (2,), jnp.int32)


def _expect(name: str, x: jax.Array, shape: tuple[int, ...], dtype: object) -> None:
    if x.shape != shape or x.dtype != jnp.dtype(dtype):  # type: ignore[call-overload]
        raise ValueError(
            f"{name}: expected {jnp.dtype(dtype).name}{list(shape)}, "  # type: ignore[call-overload]
            f"got {x.dtype.name}{list(x.shape)}; see host_ops.types for what each field holds"
        )
