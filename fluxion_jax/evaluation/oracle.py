"""What the oracle plans in a step: the smallest budgets within a tolerance of full attention.

Units are ranked as the product ranks them, by integer bounds per query head; only the budget is
known with hindsight. Budgets lie on a ladder whose rungs are at most a quarter apart, so that a
plan costs a few matrix products. Among the granularities each group takes the one that may read the
fewest bytes, summaries and K/V; a group whose heads all stream reads nothing.

Axes: B batch, V branches, N query heads, K KV heads, G = N // K, U units, R rungs, H head size.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from fluxion_jax.cache.layout import BLOCK_TOKENS, GRANULARITIES_TOKENS, KVLayout, host_tokens
from fluxion_jax.cache.summaries import quantise_query
from fluxion_jax.evaluation.branch_attention import Past, Prefix, Scores, weighted_sum
from fluxion_jax.policy.protocol import Plan


def ladder(units: int) -> np.ndarray:
    """Budgets in units that are tried, ascending from 0 to `units`: int32 `[R]`."""
    rungs = [0]
    while rungs[-1] < units:
        rungs.append(min(units, rungs[-1] + max(1, rungs[-1] // 5)))
    return np.asarray(rungs, np.int32)


def oracle_plan(
    q: jax.Array,
    tolerances: jax.Array,
    scores: Scores,
    window: jax.Array,
    prefix: Prefix,
    past: Past,
    summaries: jax.Array,
    exponents: jax.Array,
    layout: KVLayout,
) -> Plan:
    """Plans one layer of one step for branches with a tolerance each.

    Args:
      q: `[B, V, N, H]`.
      tolerances: float32 `[V]`.
      scores: of all keys.
      window: bool `[B, S]`, prompt tokens of the resident window.
      prefix: the layer's prompt.
      past: the branches' own tokens.
      summaries: int8 `[B, K, U, 2, H]`.
      exponents: int32 `[B, K, H]`.
      layout: of the cache.

    Returns:
      The plan, with a branch axis: `[B, V, K]` and `[B, V, N]`.
    """
    num_heads, head_dim = q.shape[2:]
    host_blocks = host_tokens(layout, past.lengths) // BLOCK_TOKENS
    curves = error_curves(q, scores, window, prefix, past, summaries, exponents, layout)
    budgets = [smallest_budgets(curve, tolerances[:, None, None]) for curve in curves]
    group = num_heads // exponents.shape[1]
    return _cheapest(jnp.stack(budgets), host_blocks, group, head_dim, layout)


class ErrorCurve(NamedTuple):
    """What is left of the error at each budget of a granularity.

    Attributes:
      budgets_tokens: int32 `[R]`, ascending from 0 to everything.
      errors: float32 `[B, V, K, G, R]`, of a head's output over the step's largest.
    """

    budgets_tokens: np.ndarray
    errors: jax.Array


def error_curves(
    q: jax.Array,
    scores: Scores,
    window: jax.Array,
    prefix: Prefix,
    past: Past,
    summaries: jax.Array,
    exponents: jax.Array,
    layout: KVLayout,
) -> list[ErrorCurve]:
    """Errors of one layer of one step by budget, per granularity; see `oracle_plan`."""
    batch = q.shape[0]
    kv_heads = exponents.shape[1]
    host_blocks = host_tokens(layout, past.lengths) // BLOCK_TOKENS
    inside = window[:, None, None, None, :]
    peak = scores.peak()
    full_sum, full_mass = weighted_sum(scores, peak, prefix, past)
    full = full_sum / full_mass[..., None]
    largest = jnp.linalg.norm(full, axis=-1).max(axis=(2, 3), keepdims=True)
    near = weighted_sum(scores.among(inside), peak, prefix, past)
    far = jnp.where(inside, 0.0, jnp.exp(scores.prompt - peak[..., None]))
    blocks = _block_sums(far, prefix, layout)
    q8 = jax.vmap(quantise_query, (1, None, None), 1)(
        q, exponents, jnp.zeros((batch, kv_heads), bool)
    )
    return [
        _curve(
            granularity,
            _scores(q8, summaries, granularity, host_blocks, kv_heads),
            blocks,
            near,
            full,
            largest,
        )
        for granularity in GRANULARITIES_TOKENS
    ]


def smallest_budgets(curve: ErrorCurve, tolerances: jax.Array) -> jax.Array:
    """The smallest budgets in tokens that keep to tolerances which broadcast against `[..., G]`."""
    budgets = jnp.asarray(curve.budgets_tokens)
    enough = curve.errors <= tolerances[..., None]
    return budgets[jnp.argmax(enough, axis=-1)]


def _block_sums(far: jax.Array, prefix: Prefix, layout: KVLayout) -> tuple[jax.Array, jax.Array]:
    """Weighted values and weights of each host block: `[B, V, K, G, M, H]`, `[B, V, K, G, M]`."""
    sinks = layout.sink_tokens
    shape = (*far.shape[:4], -1, BLOCK_TOKENS)
    weights = far[..., sinks:].reshape(shape)
    values = prefix.v[:, :, sinks:]
    values = values.reshape(*values.shape[:2], -1, BLOCK_TOKENS, values.shape[-1])
    dtype = prefix.v.dtype
    sums = jnp.einsum(
        "bvkgmc,bkmch->bvkgmh",
        weights.astype(dtype),
        values,
        precision="highest" if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    return sums, weights.sum(axis=-1)


def _scores(
    q8: jax.Array, summaries: jax.Array, granularity: int, host_blocks: jax.Array, kv_heads: int
) -> jax.Array:
    """int32 `[B, V, K, G, U]`; the smallest int32 from the number of units on."""
    sizes = jnp.full((q8.shape[0], kv_heads), granularity, jnp.int32)

    def one_branch(q8: jax.Array) -> jax.Array:
        return pallas_kernels.score_units(q8, summaries, sizes, host_blocks)

    scores = jax.vmap(one_branch, 1, 1)(q8)
    units = scores.shape[-1] * BLOCK_TOKENS // granularity
    return scores[..., :units].reshape(*q8.shape[:2], kv_heads, -1, units)


def _curve(
    granularity: int,
    scores: jax.Array,
    blocks: tuple[jax.Array, jax.Array],
    near: tuple[jax.Array, jax.Array],
    full: jax.Array,
    largest: jax.Array,
) -> ErrorCurve:
    units = scores.shape[-1]
    size = granularity // BLOCK_TOKENS
    sums = blocks[0].reshape(*scores.shape[:4], units, size, -1).sum(axis=5)
    masses = blocks[1].reshape(*scores.shape[:4], units, size).sum(axis=5)
    order = jnp.argsort(-scores.astype(jnp.float32), axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    rungs = ladder(units)
    # Which rung first includes the unit, as a row of the matrix that sums units into rungs.
    included = rank[..., None, :] < jnp.asarray(rungs)[:, None]
    share = included.astype(jnp.float32)
    sums = jnp.einsum("...ru,...uh->...rh", share, sums, precision="highest")
    masses = jnp.einsum("...ru,...u->...r", share, masses, precision="highest")
    out = (near[0][..., None, :] + sums) / (near[1][..., None] + masses)[..., None]
    errors = jnp.linalg.norm(out - full[..., None, :], axis=-1) / largest[..., None]
    # Everything is always enough, whatever rounding says.
    errors = jnp.where(jnp.asarray(rungs) == units, 0.0, errors)
    return ErrorCurve(rungs * granularity, errors)


def _cheapest(
    budgets: jax.Array, host_blocks: jax.Array, group: int, head_dim: int, layout: KVLayout
) -> Plan:
    """The granularity of the fewest bytes per group, of budgets `[D, B, V, K, G]`."""
    held = (host_blocks * BLOCK_TOKENS)[None, :, None, None]
    read = jnp.minimum(budgets.sum(axis=-1), held)
    sizes = jnp.asarray(GRANULARITIES_TOKENS, jnp.int32)
    units = -(-held // sizes[:, None, None, None]) * (read > 0)
    token_bytes = 2 * head_dim * layout.jax_dtype.itemsize
    cost = read.astype(jnp.float32) * token_bytes + units * float(layout.unit_summary_bytes)
    # Equal costs go to the coarsest unit, which is ranked fastest.
    best = len(GRANULARITIES_TOKENS) - 1 - jnp.argmin(cost[::-1], axis=0)
    chosen = jnp.take_along_axis(budgets, best[None, ..., None], axis=0)[0]
    return Plan(
        granularity=sizes[best],
        budget_tokens=chosen.reshape(*chosen.shape[:2], -1),
        shared=jnp.zeros(best.shape, bool),
    )
