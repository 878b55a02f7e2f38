"""Attention states: what attention over a part of the keys leaves for the parts to be merged.

The state of a set of keys is `(out, lse)`: the softmax-weighted mean of the values, and the natural
logarithm of the sum of exponentials of the scaled scores. The states of disjoint sets merge into
that of their union, in any order and any grouping, which is what lets attention be split between
the resident window, the host and the device and still be exact (paper, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

import pallas_kernels
from fluxion_jax.errors import ConfigError


class AttentionState(NamedTuple):
    """Attention over a set of keys.

    Attributes:
      out: float32 `[..., H]`, the attention output; 0 for the empty set.
      lse: float32 `[...]`, natural logarithm of the sum of exponentials; `-inf` for the empty set.
    """

    out: jax.Array
    lse: jax.Array

    @classmethod
    def empty(cls, shape: Sequence[int]) -> AttentionState:
        """The state of the empty set, the identity of `merge`.

        Args:
          shape: of `out`, `[..., H]`.

        Returns:
          Zeros and `-inf`.
        """
        return cls(jnp.zeros(shape, jnp.float32), jnp.full(shape[:-1], -jnp.inf, jnp.float32))


def merge(*states: tuple[jax.Array, jax.Array]) -> AttentionState:
    """Merges the states of disjoint sets of keys into that of their union.

    Commutative, and associative up to rounding. An empty state changes nothing; a NaN surfaces.

    Args:
      *states: one or more `(out float32 [..., H], lse float32 [...])` of equal shapes.

    Returns:
      The state of the union.

    Raises:
      ConfigError: if there is no state, or the shapes do not fit each other.
    """
    if not states:
        raise ConfigError("expected at least one attention state, got none; use empty() for none")
    shape = states[0][0].shape
    for out, lse in states:
        if out.shape != shape or lse.shape != shape[:-1]:
            raise ConfigError(
                f"expected states with out {shape} and lse {shape[:-1]} like the first, got "
                f"{out.shape} and {lse.shape}; merge states of the same queries"
            )
    return AttentionState(*pallas_kernels.merge_states(states))
