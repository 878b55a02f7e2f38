"""The plans of many policies at one step, those of a kind together.

Policies that differ in their numbers alone, such as one policy at several tolerances, are stacked
and planned by one `vmap`: what all branches share, such as the prompt's sketch, is then read once.

Axes: B batch, V branches, N query heads, K KV heads, H head size.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fluxion_jax.cache.layout import BLOCK_TOKENS, KVLayout, host_tokens
from fluxion_jax.evaluation import branch_attention, branch_sketch
from fluxion_jax.evaluation.branch_attention import Past, Prefix
from fluxion_jax.evaluation.branch_sketch import Before, Sketched
from fluxion_jax.evaluation.oracle import oracle_plan
from fluxion_jax.policy.oracle_policy import OraclePolicy
from fluxion_jax.policy.protocol import Features, Plan, Policy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kind:
    """Policies that differ in their numbers alone.

    Attributes:
      stacked: a policy whose numbers have an axis of these policies in front.
      branches: which branches they are.
    """

    stacked: Any
    branches: tuple[int, ...] = dataclasses.field(metadata={"static": True})


def kinds(policies: Sequence[Policy]) -> tuple[Kind, ...]:
    """Sorts policies by what they have in common."""
    found: dict[Any, list[int]] = defaultdict(list)
    for v, policy in enumerate(policies):
        leaves, tree = jax.tree.flatten(policy)
        key = tree, tuple((np.shape(x), jnp.result_type(x)) for x in leaves)
        found[key].append(v)
    return tuple(
        Kind(jax.tree.map(lambda *xs: jnp.stack(xs), *(policies[v] for v in own)), tuple(own))
        for own in found.values()
    )


@dataclasses.dataclass(frozen=True)
class Layer:
    """What is known of a layer before its step.

    Attributes:
      index: of the layer, a Python int.
      prefix: its prompt.
      sketched: the prompt's sketch, None if the layout wants none or nothing can leave the window.
      scale: factor on the scores.
      layout: of the cache.
      capacity_blocks: host blocks that a sequence of the cache may have.
    """

    index: int
    prefix: Prefix
    sketched: Sketched | None
    scale: float
    layout: KVLayout
    capacity_blocks: int


def plan_step(
    q: jax.Array,
    policies: Sequence[Kind],
    layer: Layer,
    scores: branch_attention.Scores,
    window: jax.Array,
    past: Past,
    before: Before | None,
    summaries: jax.Array,
    exponents: jax.Array,
) -> tuple[Plan, Before]:
    """Every branch's plan.

    Args:
      q: float32 `[B, V, N, H]`.
      policies: of all branches.
      layer: see `Layer`.
      scores: of all keys.
      window: bool `[B, S]`, prompt tokens of the resident window.
      past: the branches' own tokens.
      before: the step before; None without a sketch.
      summaries: int8 `[B, K, U, 2, H]`.
      exponents: int32 `[B, K, H]`.

    Returns:
      The plan, with a branch axis: `[B, V, K]` and `[B, V, N]`; and what the next step wants to
      know of this one.
    """
    near = scores.among(window[:, None, None, None, :])
    out, lse = branch_attention.attend(near, layer.prefix, past)
    seen = Before(q, lse.reshape(q.shape[:3]))
    plan_one = _planner(layer, past, before)
    plans = []
    for kind in policies:
        own = np.asarray(kind.branches)
        if isinstance(kind.stacked, OraclePolicy):
            # Oracles need the attention to everything.
            plan = oracle_plan(
                q[:, own],
                jnp.asarray(kind.stacked.tolerance),
                jax.tree.map(lambda x, own=own: x[:, own], scores),
                window,
                layer.prefix,
                Past(past.k[:, own], past.v[:, own], past.step, past.prompt_tokens),
                summaries,
                exponents,
                layer.layout,
            )
        else:
            state = (q, out.reshape(q.shape), seen.window_lse, past.k, before)
            mine = jax.tree.map(lambda x, own=own: x[:, own], state)
            plan = jax.vmap(plan_one, (0, 1), 1)(kind.stacked, mine)
        plans.append(plan)
    order = np.argsort([v for kind in policies for v in kind.branches])
    joined = jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1)[:, order], *plans)
    return joined, seen


def _planner(layer: Layer, past: Past, before: Before | None) -> Any:
    """The function that plans for one policy, given what differs between branches."""
    see = features_of(layer, past, before is not None)

    def plan_one(policy: Policy, branch: Any) -> Plan:
        # Plans are joined, and not every policy says these.
        plan = policy.plan(see(*branch), past.lengths + 1)
        return plan._replace(clipped=None, notes=None)

    return plan_one


def features_of(layer: Layer, past: Past, sketched: bool) -> Callable[..., Features]:
    """What a policy sees in a step, as a function of what differs between branches.

    Args:
      layer: see `Layer`.
      past: of the step; its keys are not looked at.
      sketched: whether the step before is known and the layer has a sketch.

    Returns:
      A function of q and window_out `[B, N, H]`, window_lse `[B, N]`, the branch's own keys `[B, K,
      T, H]` and `Before` without the branch axis, None without a sketch.
    """
    layout = layer.layout
    held = host_tokens(layout, past.lengths)
    shared_window = branch_sketch.prompt_window(layer.prefix, past, layout)
    drawn, runs = layer.sketched, None
    if sketched and drawn is not None:
        blocks = held // BLOCK_TOKENS
        runs = branch_sketch.runs(drawn, layer.prefix, blocks, layer.capacity_blocks)

    def see(
        q: jax.Array,
        window_out: jax.Array,
        window_lse: jax.Array,
        own_k: jax.Array,
        before: Before | None,
    ) -> Features:
        window = branch_sketch.branch_window(shared_window, own_k, past)
        sketch = None
        if drawn is not None and runs is not None and before is not None:
            sketch = branch_sketch.branch_sketch(drawn, runs, before.q, before.window_lse, past)
        return Features(
            q=q,
            window_out=window_out,
            window_lse=window_lse,
            layer=layer.index,
            num_kv_heads=layout.num_kv_heads,
            layout=layout,
            scale=layer.scale,
            capacity_blocks=layer.capacity_blocks,
            host_tokens=held,
            window_k=window.k,
            window_positions=window.positions,
            sketch=sketch,
        )

    return see
