"""How much attention mass a selection recalls, by what it is ranked with.

Every method picks the same number of units for the same query; only the score differs:

- `oracle`: the true attention mass of the unit, which no method can know beforehand;
- `float`: the bound from the unit's minimum and maximum per channel, in float32;
- `integer`: the same bound as the product computes it, from int8 summaries and an int8 query;
- `mean`: the dot product with the mean of the unit's keys.

Axes: T queries, N query heads, K KV heads, G = N // K, S host tokens, U units, H head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from fluxion_jax.bench.capture import Captured
from fluxion_jax.cache.layout import BLOCK_TOKENS
from fluxion_jax.cache.summaries import MIN_EXPONENT, quantise_query, summarise_blocks

METHODS = ("oracle", "float", "integer", "mean")
Array = npt.NDArray[np.floating[Any]]
# Lengths in whole multiples of this share a compiled program.
_PADDED_TOKENS = 1024


class Attention(NamedTuple):
    """Full attention of the captured queries, split into the host's tokens and the window.

    Attributes:
      host: `[K, T, G, S]`, weight of each host token as a share of the full mass.
      window_mass: `[K, T, G]`, weight of all other tokens together.
      window_out: `[K, T, G, H]`, their part of the output.
      full_out: `[K, T, G, H]`, the output of full attention.
    """

    host: Array
    window_mass: Array
    window_out: Array
    full_out: Array


def grouped(q: Array, kv_heads: int) -> Array:
    """`[T, N, H]` as `[K, T, G, H]`."""
    steps, heads, head_dim = q.shape
    return np.moveaxis(q.reshape(steps, kv_heads, heads // kv_heads, head_dim), 1, 0)


def full_attention(layer: Captured, positions: npt.NDArray[np.int64], host: slice) -> Attention:
    """Attends from each query to all tokens up to its own position.

    Args:
      layer: the captured layer.
      positions: int `[T]` of the queries.
      host: which tokens the host holds; none of them behind a query.
    """
    scores = _products(grouped(layer.q, len(layer.k)), layer.k) * layer.scale
    seen = np.arange(layer.k.shape[1]) <= positions[:, None]
    scores = np.where(seen[None, :, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out = _mix(weights, layer.v)
    of_host = weights[..., host]
    return Attention(
        host=of_host,
        window_mass=1 - of_host.sum(axis=-1),
        window_out=out - _mix(of_host, layer.v[:, host]),
        full_out=out,
    )


def unit_scores(
    method: str, layer: Captured, attention: Attention, host: slice, granularity: int, shared: bool
) -> Array:
    """What a method ranks units by: `[K, T, G, U]`, or `[K, T, 1, U]` where groups rank once.

    Args:
      method: one of `METHODS`.
      layer: the captured layer.
      attention: of the same layer.
      host: which tokens the host holds.
      granularity: tokens of a unit.
      shared: rank once per group, by the maximum over its heads.
    """
    keys = layer.k[:, host]
    q = grouped(layer.q, len(keys))
    if method == "oracle":
        scores = np.add.reduceat(attention.host, _starts(keys, granularity), axis=-1)
    elif method == "mean":
        starts = _starts(keys, granularity)
        counts = np.diff([*starts, keys.shape[1]])
        scores = _products(q, np.add.reduceat(keys, starts, axis=1) / counts[:, None])
    elif method == "float":
        scores = _bound(q, *_extremes(keys, keys, granularity))
    else:
        scores = _integer_scores(layer, keys, granularity, shared)
    return scores.max(axis=2, keepdims=True) if shared else scores


def select(scores: Array, k_units: int) -> npt.NDArray[np.bool_]:
    """Marks the `k_units` best of the last axis, ties to the lowest id."""
    chosen = np.zeros(scores.shape, bool)
    best = np.argsort(-scores, axis=-1, kind="stable")[..., :k_units]
    np.put_along_axis(chosen, best, True, axis=-1)
    return chosen


def judge(
    chosen: npt.NDArray[np.bool_],
    layer: Captured,
    attention: Attention,
    host: slice,
    granularity: int,
) -> tuple[Array, Array]:
    """What a selection recalls and what it does to the output.

    Args:
      chosen: bool `[K, T, G or 1, U]`.
      layer: the captured layer.
      attention: of the same layer.
      host: which tokens the host holds.
      granularity: tokens of a unit.

    Returns:
      `(mass, error)`, each `[K, T, G]`: the share of the full mass in the chosen units, and the
      error of the output over the step's largest head output (Euclidean norms).
    """
    tokens = np.repeat(chosen, granularity, axis=-1)[..., : attention.host.shape[-1]]
    kept = np.where(tokens, attention.host, 0)
    mass = kept.sum(axis=-1)
    out = attention.window_out + _mix(kept, layer.v[:, host])
    out /= (attention.window_mass + mass)[..., None]
    error = np.linalg.norm(out - attention.full_out, axis=-1)
    largest = np.linalg.norm(attention.full_out, axis=-1).max(axis=(0, 2), keepdims=True)
    return mass, error / largest


def _products(q: Array, keys: Array) -> Array:
    kv_heads, steps, group, head_dim = q.shape
    flat = q.reshape(kv_heads, steps * group, head_dim) @ np.swapaxes(keys, 1, 2)
    return flat.reshape(kv_heads, steps, group, -1)


def _mix(weights: Array, values: Array) -> Array:
    kv_heads, steps, group, tokens = weights.shape
    flat = weights.reshape(kv_heads, steps * group, tokens) @ values
    return flat.reshape(kv_heads, steps, group, -1)


def _starts(keys: Array, granularity: int) -> npt.NDArray[np.int64]:
    return np.arange(0, keys.shape[1], granularity)


def _extremes(low: Array, high: Array, rows: int) -> tuple[Array, Array]:
    """Minima of `low` and maxima of `high` over runs of `rows`, the last perhaps shorter."""
    starts = _starts(low, rows)
    return np.minimum.reduceat(low, starts, axis=1), np.maximum.reduceat(high, starts, axis=1)


def _bound(q: Array, low: Array, high: Array) -> Array:
    """The sum over channels of `max(q * low, q * high)`."""
    return _products(np.maximum(q, 0), high) + _products(np.minimum(q, 0), low)


def _integer_scores(layer: Captured, keys: Array, granularity: int, shared: bool) -> Array:
    kv_heads, tokens, head_dim = keys.shape
    padding = -tokens % _PADDED_TOKENS
    blocks = np.pad(keys, [(0, 0), (0, padding), (0, 0)])
    blocks = blocks.reshape(kv_heads, -1, BLOCK_TOKENS, head_dim)
    summaries, q8 = _quantised(blocks, tokens // BLOCK_TOKENS, layer.q, shared)
    summaries = np.asarray(summaries[:, : tokens // BLOCK_TOKENS], np.float32)
    bounds = _extremes(summaries[:, :, 0], summaries[:, :, 1], granularity // BLOCK_TOKENS)
    # Magnitudes stay below 2**24, where float32 products of integers are exact.
    return _bound(grouped(np.asarray(q8, np.float32), kv_heads), *bounds)


@jax.jit
def _quantised(
    blocks: jax.Array, num_blocks: jax.Array, q: jax.Array, shared: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Summaries `[K, M, 2, H]` of the first blocks of `[K, M, C, H]`, and queries `[T, N, H]`."""
    kv_heads, _, _, head_dim = blocks.shape
    fresh = jnp.full((1, kv_heads, head_dim), MIN_EXPONENT, jnp.int32)
    summaries, exponents, _ = summarise_blocks(blocks[None], num_blocks[None], fresh)
    of_steps = jnp.broadcast_to(exponents, (len(q), kv_heads, head_dim))
    return summaries[0], quantise_query(q, of_steps, jnp.broadcast_to(shared, of_steps.shape[:2]))
