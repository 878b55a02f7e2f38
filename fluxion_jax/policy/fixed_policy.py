"""Fixed policies: the same granularity and the same share of the context for every head.

These are the baselines of the paper (section 5: Quest-type summaries, block 16 or 32, budget 5 or
2 %), and `full`, the reference against which they are judged. All of them are one pytree type with
numeric leaves, so one compiled program serves them all.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from fluxion_jax.cache.layout import GRANULARITIES_TOKENS
from fluxion_jax.errors import ConfigError, require_number
from fluxion_jax.policy.protocol import Features, Plan

# More than any sequence: a budget that always covers everything.
EVERYTHING_TOKENS = np.iinfo(np.int32).max


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FixedPolicy:
    """One granularity and one budget for all heads; build it with `fixed` or `full`.

    Attributes:
      granularity: int32 scalar, tokens of a unit.
      budget_fraction: float32 scalar, share of the whole sequence; 1 or more means everything.
      per_group: bool scalar, whether a group ranks once by the maximum over its heads.
    """

    granularity: jax.Array | np.ndarray
    budget_fraction: jax.Array | np.ndarray
    per_group: jax.Array | np.ndarray

    def plan(self, features: Features, lengths: jax.Array) -> Plan:
        """Plans the same for every head; see `Policy.plan`."""
        batch, num_heads, _ = features.q.shape
        exact = self.budget_fraction * lengths.astype(jnp.float32)
        # Rounding of float32 must not push an exact multiple over its ceiling.
        wanted = jnp.ceil(exact * (1.0 - 2.0**-22)).astype(jnp.int32)
        wanted = jnp.where(self.budget_fraction >= 1.0, EVERYTHING_TOKENS, wanted)
        groups = (batch, features.num_kv_heads)
        return Plan(
            granularity=jnp.full(groups, self.granularity, jnp.int32),
            budget_tokens=jnp.broadcast_to(wanted[:, None], (batch, num_heads)),
            shared=jnp.full(groups, self.per_group, bool),
        )

    def __str__(self) -> str:
        if float(self.budget_fraction) >= 1.0:
            return "full"
        group = ":group" if bool(self.per_group) else ""
        return f"fixed:{int(self.granularity)}:{float(self.budget_fraction):.6g}{group}"


def fixed(
    granularity_tokens: int, budget_fraction: float, *, per_group: bool = False
) -> FixedPolicy:
    """The same granularity and budget for every head.

    Args:
      granularity_tokens: 16, 32, 64 or 128.
      budget_fraction: share of the sequence's whole length that each head may read from the host
        cache, in (0, 1]; the resident window is not counted; rounded up to units.
      per_group: rank once per group, by the maximum over its heads, instead of per query head.

    Returns:
      A policy whose numbers are data; printed, it is the name that `parse_policy` takes.

    Raises:
      ConfigError: a value is out of range.

    Example:
      >>> import fluxion_jax as fx
      >>> print(fx.fixed(32, 0.02, per_group=True))
      fixed:32:0.02:group
    """
    whole = isinstance(granularity_tokens, int | np.integer)
    if not whole or granularity_tokens not in GRANULARITIES_TOKENS:
        raise ConfigError(
            f"expected a granularity of {GRANULARITIES_TOKENS} tokens, got {granularity_tokens}"
        )
    require_number("a budget fraction in (0, 1]", budget_fraction, "0.05 reads a twentieth")
    if not 0.0 < budget_fraction <= 1.0:
        raise ConfigError(f"expected a budget fraction in (0, 1], got {budget_fraction}")
    return FixedPolicy(
        np.asarray(granularity_tokens, np.int32),
        np.asarray(budget_fraction, np.float32),
        np.asarray(per_group, np.bool_),
    )


def full() -> FixedPolicy:
    """Every head reads everything, in the coarsest units because they are never ranked.

    Example:
      >>> import fluxion_jax as fx
      >>> print(fx.full())
      full
    """
    return fixed(GRANULARITIES_TOKENS[-1], 1.0)
