"""Merging of attention states: attention over parts of the keys becomes attention over all.

A state is `(out, lse)`: the softmax-weighted mean of the values, and the natural logarithm of the
sum of exponentials. The state of an empty set is `(0, -inf)`, the identity of the merge.

Axes: B batch, N query heads, H head size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.registry import Implementation, dispatch

State = tuple[jax.Array, jax.Array]


def merge_states(states: Sequence[State], *, implementation: Implementation = None) -> State:
    """Merges the attention states of disjoint sets of keys into that of their union.

    The merge is commutative and associative up to rounding, and a state with `lse = -inf`
    changes nothing, whatever its `out`. A NaN in the state of a non-empty set surfaces.

    Args:
      states: one or more pairs of `out` float32 `[..., H]` and `lse` float32 `[...]`.
      implementation: "xla", or None for the best available.

    Returns:
      `out` float32 `[..., H]` and `lse` float32 `[...]`.

    Raises:
      ValueError: if there is no state to merge.
    """
    if not states:
        raise ValueError("expected at least one attention state, got none; pass (out, lse) pairs")
    return dispatch("merge_states", implementation, {"xla": _merge_states_xla}, states)  # type: ignore[no-any-return]


def _merge_states_xla(states: Sequence[State]) -> State:
    # State by state: a stack of them and reductions over it would be kernels of their own.
    outs, lses = ([x.astype(jnp.float32) for x in part] for part in zip(*states, strict=True))
    largest = functools.reduce(jnp.maximum, lses)
    # All sets may be empty: -inf - (-inf) would be NaN.
    finite = jnp.where(largest == -jnp.inf, 0.0, largest)
    weights = [jnp.exp(lse - finite) for lse in lses]
    total = functools.reduce(jnp.add, weights)
    weighted = [
        weight[..., None] * jnp.where((lse == -jnp.inf)[..., None], 0.0, out)
        for weight, lse, out in zip(weights, lses, outs, strict=True)
    ]
    empty = total == 0.0
    divisor = jnp.where(empty, 1.0, total)
    merged = functools.reduce(jnp.add, weighted) / divisor[..., None]
    return merged, jnp.where(empty, -jnp.inf, finite + jnp.log(divisor))
