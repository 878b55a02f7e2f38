"""What a policy is: it looks at a layer's decode step and plans what each head may read.

A policy is a pytree whose leaves are its numbers, so that changing a number does not recompile.
Its `plan` is pure `jnp` and is traced into the decode step. It sees what the device has at hand
before anything is read from the host: this step's queries, the resident window and attention over
it, and the layer's sketch. What a policy does not look at costs nothing.

Axes: B batch, N query heads, K KV heads, H head size, W window slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from fluxion_jax.cache.layout import KVLayout
from fluxion_jax.cache.sketch import Sketch

NEWEST_TOKENS = 16
"""So many tokens of the window are its newest, the current one among them."""


class Features(NamedTuple):
    """What a policy may look at.

    Attributes:
      q: float32 `[B, N, H]`, this step's queries after RoPE, not scaled.
      window_out: float32 `[B, N, H]`, attention over the resident window.
      window_lse: float32 `[B, N]`, its log-sum-exp, natural log.
      layer: index of the layer in the model, a Python int; in a compiled loop over the layers of a
        stacked cache an int32 scalar.
      num_kv_heads: `K`, a Python int.
      layout: the cache's layout, static.
      scale: factor on the scores, a Python float.
      capacity_blocks: host blocks that a sequence may have, a Python int; 0 if the whole cache
        fits into the window.
      host_tokens: int32 `[B]`, tokens that can be read from the host.
      window_k: `[B, K, W, H]` in the cache's dtype, keys of the resident window.
      window_positions: int32 `[B, W]`, position of the token in each slot, -1 where none counts.
      sketch: what the device knows of the host cache; None if its layout wants none, or the
        capacity is 0.
      window_scores: float32 `[B, N, 3]`, the largest score in the window, the log-sum-exp of the
        sinks' scores and that of the `NEWEST_TOKENS` newest ones', where the window's kernel brings
        them along; None elsewhere, for they follow from `window_k`.
    """

    q: jax.Array
    window_out: jax.Array
    window_lse: jax.Array
    layer: int | jax.Array
    num_kv_heads: int
    layout: KVLayout
    scale: float
    capacity_blocks: int
    host_tokens: jax.Array
    window_k: jax.Array
    window_positions: jax.Array
    sketch: Sketch | None
    window_scores: jax.Array | None = None


class Plan(NamedTuple):
    """What each head may read from the host cache in this step.

    Attributes:
      granularity: int32 `[B, K]`, tokens of a unit: 16, 32, 64 or 128.
      budget_tokens: int32 `[B, N]`; rounded up to units, 0 means that the resident window is
        enough; a budget beyond the host cache means all of it.
      shared: bool `[B, K]`; true where the group ranks once, by the maximum over its heads.
      clipped: bool `[B, N]`, heads that the policy wanted to give more than the host holds; counted
        in the statistics. None for policies that cannot tell.
      notes: any pytree of arrays, handed through to `LayerStats.notes` for research.

    Example:
      >>> import jax.numpy as jnp
      >>> import fluxion_jax as fx
      >>> plan = fx.Plan(  # one sequence, one KV head, two query heads
      ...     granularity=jnp.full((1, 1), 32),
      ...     budget_tokens=jnp.asarray([[64, 0]]),
      ...     shared=jnp.zeros((1, 1), bool),
      ... )
      >>> plan.clipped is None
      True
    """

    granularity: jax.Array
    budget_tokens: jax.Array
    shared: jax.Array
    clipped: jax.Array | None = None
    notes: Any = None

    def __str__(self) -> str:
        groups, heads = list(self.granularity.shape), list(self.budget_tokens.shape)
        if any(isinstance(x, jax.core.Tracer) for x in self[:3]):
            return f"Plan of {groups} groups, traced"
        units, budgets = np.unique(self.granularity), np.asarray(self.budget_tokens)
        return (
            f"Plan of {groups} groups: units of {', '.join(map(str, units))} tokens; budgets of "
            f"{heads} heads {budgets.min()} to {budgets.max()} tokens, mean {budgets.mean():.4g}; "
            f"groups that rank once {int(np.sum(self.shared))}"
        )


@runtime_checkable
class Policy(Protocol):
    """Anything with a `plan`; register the class as a pytree to change its numbers freely.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import fluxion_jax as fx
      >>> @jax.tree_util.register_static
      ... class Window:
      ...     def plan(self, features, lengths):
      ...         groups = (lengths.shape[0], features.num_kv_heads)
      ...         return fx.Plan(
      ...             granularity=jnp.full(groups, 16),
      ...             budget_tokens=jnp.zeros(features.q.shape[:2], jnp.int32),
      ...             shared=jnp.zeros(groups, bool),
      ...         )

      >>> isinstance(Window(), fx.Policy)
      True
    """

    def plan(self, features: Features, lengths: jax.Array) -> Plan:
        """Plans one layer of one decode step.

        Args:
          features: see `Features`.
          lengths: int32 `[B]`, tokens of each sequence, the current one included.

        Returns:
          What each head may read.
        """
        ...


def needs_sketch(policy: Policy) -> bool:
    """Whether a policy looks at the cache's sketch; its class says `needs_sketch = True`."""
    return bool(getattr(policy, "needs_sketch", False))
