"""A plan as work: how many units each head selects, and how far each task goes to the host.

Axes: B batch, N query heads, K KV heads, G = N // K. A task is one KV head of one sequence.
"""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp

import pallas_kernels
from fluxion_jax.cache.layout import BLOCK_TOKENS, GRANULARITIES_TOKENS, KVLayout
from fluxion_jax.policy.protocol import Plan
from fluxion_jax.policy.split import Split
from fluxion_jax.status import STATUS_PLAN
from pallas_kernels import Division, UnsupportedImplementationError
from pallas_kernels.bitmaps import fold_last


def divide(
    plan: Plan, host_blocks: jax.Array, everything: jax.Array, split: Split, layout: KVLayout
) -> Division:
    """Turns a plan into units, and cuts every task between host and device.

    Args:
      plan: of the layer.
      host_blocks: int32 `[B]`, selectable blocks of each row.
      everything: bool `[B]`, rows that read all of them.
      split: which part the host does.
      layout: of the cache.

    Returns:
      One kernel's results on a GPU, for up to 128 tasks.
    """
    with contextlib.suppress(UnsupportedImplementationError):
        return _in_one_kernel(plan, host_blocks, everything, split, layout)
    return _by_operations(plan, host_blocks, everything, split, layout)


def unknown_granularity(plan: Plan) -> jax.Array:
    """Where the plan's granularity is none that there is, bool `[B, K]`."""
    # One by one: a kernel less than membership of an array.
    known = [plan.granularity == tokens for tokens in GRANULARITIES_TOKENS]
    return ~functools.reduce(jnp.logical_or, known)


def _ranked_units(granularity: jax.Array, host_blocks: jax.Array, k_units: jax.Array) -> jax.Array:
    """Units that have to be scored, int32 `[B, K]`; none where all or nothing is wanted."""
    units = -(-host_blocks[:, None] // (granularity // BLOCK_TOKENS))
    wanted = k_units.reshape(*units.shape, -1)
    ranked = fold_last(jnp.maximum, wanted) > 0
    ranked &= fold_last(jnp.minimum, wanted) < units
    return jnp.where(ranked, units, 0)


def _in_one_kernel(
    plan: Plan, host_blocks: jax.Array, everything: jax.Array, split: Split, layout: KVLayout
) -> Division:
    cut = split.cut()
    scans = cut.counts_summaries and layout.summaries == "host"
    return pallas_kernels.divide_work(
        plan.granularity,
        plan.budget_tokens,
        plan.shared.astype(jnp.int32),
        host_blocks,
        everything.astype(jnp.int32),
        cut.share,
        cut.ahead_bytes,
        granularities=GRANULARITIES_TOKENS,
        unknown_status=STATUS_PLAN,
        sides=split.sides,
        block_bytes=layout.block_bytes,
        scanned_bytes=layout.unit_summary_bytes if scans else 0,
        least=cut.least_bytes,
    )


def _by_operations(
    plan: Plan, host_blocks: jax.Array, everything: jax.Array, split: Split, layout: KVLayout
) -> Division:
    groups = plan.granularity.shape
    group = plan.budget_tokens.shape[1] // groups[1]
    unknown = unknown_granularity(plan)
    granularity = jnp.where(unknown, BLOCK_TOKENS, plan.granularity).astype(jnp.int32)
    unit_blocks = granularity // BLOCK_TOKENS
    units = -(-host_blocks[:, None] // unit_blocks)
    wanted = jnp.maximum(plan.budget_tokens, 0)
    per_head = jnp.repeat(granularity, group, axis=1)
    k_units = wanted // per_head + (wanted % per_head > 0)
    units_of_head = jnp.repeat(units, group, axis=1)
    k_units = jnp.where(everything[:, None], units_of_head, jnp.minimum(k_units, units_of_head))
    upper_bound = k_units.reshape(*groups, group)
    most, all_heads = fold_last(jnp.maximum, upper_bound), fold_last(jnp.add, upper_bound)
    upper_bound = jnp.where(plan.shared, most, all_heads) * unit_blocks
    wanted_blocks = jnp.minimum(upper_bound, host_blocks[:, None])
    ranked_units = _ranked_units(granularity, host_blocks, k_units)
    scanned = ranked_units * layout.unit_summary_bytes if layout.summaries == "host" else 0
    boundary = split.boundaries(host_blocks, wanted_blocks, layout.block_bytes, scanned)
    status = jnp.where(unknown, STATUS_PLAN, 0).astype(jnp.int32)
    return Division(granularity, status, k_units, ranked_units, boundary)
