"""Merging of attention states: attention over parts of the keys becomes attention over all.

A state is `(out, lse)`: the softmax-weighted mean of the values, and the natural logarithm of the
sum of exponentials. The state of an empty set is `(0, -inf)`, the identity of the merge.

Axes: B batch, N query heads, H head size.
"""

from __future__ import annotations

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
    outs = jnp.stack([out.astype(jnp.float32) for out, _ in states])
    return merge_stacked(outs, jnp.stack([lse.astype(jnp.float32) for _, lse in states]))


def merge_stacked(out: jax.Array, lse: jax.Array) -> State:
    """Merges states that are stacked along the first axis.

    Args:
      out: float32 `[states, ..., H]`.
      lse: float32 `[states, ...]`.

    Returns:
      `out` float32 `[..., H]` and `lse` float32 `[...]`.
    """
    largest = jnp.max(lse, axis=0)
    # All sets may be empty: -inf - (-inf) would be NaN.
    finite = jnp.where(largest == -jnp.inf, 0.0, largest)
    weight = jnp.exp(lse - finite)
    total = jnp.sum(weight, axis=0)
    known = jnp.where((lse == -jnp.inf)[..., None], 0.0, out)
    empty = total == 0.0
    divisor = jnp.where(empty, 1.0, total)
    merged = jnp.sum(weight[..., None] * known, axis=0) / divisor[..., None]
    return merged, jnp.where(empty, -jnp.inf, finite + jnp.log(divisor))
