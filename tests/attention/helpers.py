"""Caches filled with known keys and values, and a compiled step over them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fluxion_jax as fx

MAX_TOKENS = 1200


@functools.lru_cache
def tokens(
    batch: int, kv_heads: int, head_dim: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values `[B, S, K, H]`, rounded to bfloat16 so that every dtype sees the same."""
    rng = np.random.default_rng(seed)
    shape = (batch, MAX_TOKENS, kv_heads, head_dim)
    drawn = [rng.standard_normal(shape) for _ in "kv"]
    k, v = (np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)) for x in drawn)
    return k, v


def filled(
    lengths: list[int],
    *,
    kv_heads: int = 2,
    head_dim: int = 64,
    dtype: str = "float32",
    summaries: str = "host",
    recent_tokens: int = 256,
) -> fx.HostKV:
    """A cache of one layer that holds the first tokens of `tokens`."""
    k, v = tokens(len(lengths), kv_heads, head_dim)
    layout = fx.KVLayout(
        1, kv_heads, head_dim, dtype, recent_tokens=recent_tokens, summaries=summaries
    )
    longest = max(lengths)
    cut = [jnp.asarray(x[:, :longest], dtype) for x in (k, v)]
    return fx.HostKV.from_arrays(layout, [cut[0]], [cut[1]], lengths, MAX_TOKENS)


@functools.lru_cache
def step(execution: fx.Execution, scale: float, return_selection: bool = True) -> Any:
    """A compiled decode step of one layer."""

    @fx.jit
    def run(cache, q, k_new, v_new, policy, split):
        out, cache, stats = fx.decode_attention(
            q,
            k_new,
            v_new,
            cache,
            0,
            policy,
            scale=scale,
            split=split,
            execution=execution,
            return_selection=return_selection,
        )
        return out, cache.advance(), stats

    return run


def new_tokens(cache: fx.HostKV, num_heads: int, seed: int = 1) -> tuple[np.ndarray, ...]:
    """A query for every head, and the next token's key and value of every row."""
    layout = cache.layout
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((cache.batch, num_heads, layout.head_dim)).astype(np.float32)
    k, v = tokens(cache.batch, layout.num_kv_heads, layout.head_dim)
    rows, lengths = np.arange(cache.batch), np.asarray(cache.lengths)
    return q, k[rows, lengths], v[rows, lengths]


def head_major(array: np.ndarray) -> np.ndarray:
    """`[B, S, K, H]` to `[B, K, S, H]`, as the oracle wants it."""
    return np.swapaxes(array, 1, 2)


def selected_blocks(selection: jax.Array, row: int, head: int) -> list[int]:
    """Block ids out of a bitmap `[B, N, W]`."""
    words = np.asarray(selection)[row, head]
    return [
        32 * w + bit for w, word in enumerate(words) for bit in range(32) if int(word) >> bit & 1
    ]
