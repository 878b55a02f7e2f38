"""Sequences that are a few rows of arrays which hold the caches of several layers.

The native library takes the first row as an operand. For the other implementations the small arrays
of a call get as many rows as the cache: rows of other layers have no work and nothing to write.
Axes: B sequences of the call, R rows of the cache's arrays.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from host_ops.types import Collected, Work


def of_one_layer(k: jax.Array, batch: int, first_row: jax.Array | None) -> Any:
    """What `k` is to a call of `batch` sequences: its shape and dtype, for checks.

    Raises:
      ValueError: there is a first row of another type, or fewer rows than sequences.
    """
    if first_row is None:
        return k
    if first_row.shape != (1,) or first_row.dtype != jnp.int32 or batch > k.shape[0]:
        raise ValueError(
            f"expected first_row int32[1] and at least {batch} rows, got {first_row.dtype.name}"
            f"{list(first_row.shape)} and {k.shape[0]} rows; pass the arrays of all layers"
        )
    return jax.ShapeDtypeStruct((batch, *k.shape[1:]), k.dtype)


def spread_rows(arrays: Any, first_row: jax.Array, rows: int) -> Any:
    """Small arrays `[B, ...]` with as many rows as the cache: zeros for all others.

    Args:
      arrays: a pytree of arrays, `Work` or `Flush` for instance; a cancel word and a status stay
        as they are.
      first_row: int32 `[1]`, where the rows of `arrays` belong.
      rows: R.

    Returns:
      The same pytree of `[R, ...]`.
    """

    def spread(x: jax.Array) -> jax.Array:
        nothing = jnp.zeros((rows, *x.shape[1:]), x.dtype)
        return jax.lax.dynamic_update_slice_in_dim(nothing, x, first_row[0], axis=0)

    if isinstance(arrays, Work):
        return jax.tree.map(spread, arrays)._replace(cancel=arrays.cancel, status=arrays.status)
    return jax.tree.map(spread, arrays)


def take_rows(arrays: Any, first_row: jax.Array, batch: int) -> Any:
    """The rows `[B, ...]` of a call out of a pytree of arrays `[R, ...]`."""
    return jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, first_row[0], batch, axis=0), arrays
    )


def take_collected(found: Collected, first_row: jax.Array, batch: int) -> Collected:
    """The call's part of what came back for the rows of all layers."""
    names = ("out", "lse", "blocks_read", "units_scanned", "selection")
    return found._replace(
        **{name: take_rows(getattr(found, name), first_row, batch) for name in names}
    )
