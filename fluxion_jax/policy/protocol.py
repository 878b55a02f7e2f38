"""What a policy is: it looks at a layer's decode step and plans what each head may read.

A policy is a pytree whose leaves are its numbers, so that changing a number does not recompile.
Its `plan` is pure `jnp` and is traced into the decode step. Axes: B batch, N query heads, K KV
heads, H head size.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import jax


class Features(NamedTuple):
    """What a policy may look at.

    Attributes:
      q: float32 `[B, N, H]`, this step's queries after RoPE, not scaled.
      window_out: float32 `[B, N, H]`, attention over the resident window.
      window_lse: float32 `[B, N]`, its log-sum-exp, natural log.
      layer: index of the layer in the model, a Python int.
      num_kv_heads: `K`, a Python int.
    """

    q: jax.Array
    window_out: jax.Array
    window_lse: jax.Array
    layer: int
    num_kv_heads: int


class Plan(NamedTuple):
    """What each head may read from the host cache in this step.

    Attributes:
      granularity: int32 `[B, K]`, tokens of a unit: 16, 32, 64 or 128.
      budget_tokens: int32 `[B, N]`; rounded up to units, 0 means that the resident window is
        enough; a budget beyond the host cache means all of it.
      shared: bool `[B, K]`; true where the group ranks once, by the maximum over its heads.
    """

    granularity: jax.Array
    budget_tokens: jax.Array
    shared: jax.Array


@runtime_checkable
class Policy(Protocol):
    """Anything with a `plan`; register the class as a pytree to change its numbers freely."""

    def plan(self, features: Features, lengths: jax.Array) -> Plan:
        """Plans one layer of one decode step.

        Args:
          features: see `Features`.
          lengths: int32 `[B]`, tokens of each sequence, the current one included.
        """
        ...
