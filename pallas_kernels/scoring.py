"""Scores of selectable units: how large `q . k` can get inside a unit, in exact integers.

A unit's summary holds, per channel, a lower and an upper bound of its keys. The score is
`sum_h max(q_h * lo_h, q_h * hi_h)`, an upper bound of the dot product with any key of the unit
(the criterion of Quest). Queries and summaries are int8, so the result is the same on any device
and in any order of summation.

Axes: B batch, N query heads, K KV heads, P blocks, U summary rows of all granularities, H head
size.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cache_rows import fits_rows
from pallas_kernels.registry import Implementation, dispatch

BLOCK_TOKENS = 16
GRANULARITIES = (16, 32, 64, 128)
BEYOND = np.int32(np.iinfo(np.int32).min)
"""Score of what is not a unit."""


def summary_rows(num_blocks: int) -> int:
    """Returns U, the summary rows of all granularities for P blocks (a multiple of 8)."""
    return num_blocks + num_blocks // 2 + num_blocks // 4 + num_blocks // 8


def unit_shift(granularity: jax.Array) -> jax.Array:
    """Returns log2 of the blocks in a unit, for granularities of 16, 32, 64 or 128 tokens."""
    # Not by comparisons: of a scalar Triton takes them for booleans, which do not add up.
    return sum(
        (jnp.clip(granularity >> (c.bit_length() - 1), 0, 1) for c in GRANULARITIES[1:]),
        start=jnp.zeros_like(granularity),
    )


def num_units(granularity: jax.Array, host_blocks: jax.Array) -> jax.Array:
    """Returns the selectable units of every task.

    Args:
      granularity: int32 `[B, K]`, tokens of a unit.
      host_blocks: int32 `[B]`, selectable blocks.

    Returns:
      int32 `[B, K]`; the last unit may be partial.
    """
    shift = unit_shift(granularity)
    return (host_blocks[:, None] + (1 << shift) - 1) >> shift


def score_units(
    q8: jax.Array,
    summaries: jax.Array,
    granularity: jax.Array,
    host_blocks: jax.Array,
    ranked: jax.Array | None = None,
    *,
    first_row: jax.Array | None = None,
    implementation: Implementation = None,
) -> jax.Array:
    """Scores the units of every task at the task's granularity.

    Args:
      q8: int8 `[B, N, H]`, queries quantised after the channel scales were folded in.
      summaries: int8 `[B, K, U, 2, H]`, lower bounds at index 0 and upper bounds at index 1; rows
        of 16-token units first, then those of 32, 64 and 128 tokens.
      granularity: int32 `[B, K]`, out of 16, 32, 64, 128.
      host_blocks: int32 `[B]`, selectable blocks.
      ranked: bool or int32 `[B, K]`, not 0 for tasks whose units are scored, or None for all of
        them. The others are treated as if they had no unit, and a kernel does not read their
        summaries.
      first_row: int32 `[1]` if `summaries` hold several layers, as `[R, K, U, 2, H]` with R >= B:
        the call's sequences are the B rows from this one on, which must be there. None for
        summaries of one layer.
      implementation: "triton" runs on a GPU and may read `summaries` from pinned host memory,
        "xla" runs everywhere on device memory; None for the best available.

    Returns:
      int32 `[B, N, P]`: entry `u` is the score of unit `u`, and the smallest int32 from the number
      of units on.

    Raises:
      ValueError: if the shapes or dtypes do not fit together.
      UnsupportedImplementationError: if no implementation asked for works here.
    """
    _check(q8, summaries, granularity, host_blocks, first_row)
    ranked = jnp.ones_like(granularity) if ranked is None else ranked
    candidates: dict[str, Callable[..., jax.Array]] = {"triton": _triton, "xla": _xla}
    arguments = (q8, summaries, granularity, host_blocks, ranked, first_row)
    return dispatch("score_units", implementation, candidates, *arguments)  # type: ignore[no-any-return]


def first_unit_row(shift: jax.Array, num_blocks: int) -> jax.Array:
    """Returns the summary row of unit 0 of the granularity with this `unit_shift`."""
    return 2 * num_blocks - ((2 * num_blocks) >> shift)


def _triton(*arguments: jax.Array) -> jax.Array:
    from pallas_kernels.scoring_triton import score_units_triton

    return score_units_triton(*arguments)


def _xla(
    q8: jax.Array,
    summaries: jax.Array,
    granularity: jax.Array,
    host_blocks: jax.Array,
    ranked: jax.Array,
    first_row: jax.Array | None,
) -> jax.Array:
    batch, num_heads, head_dim = q8.shape
    if first_row is not None:
        summaries = jax.lax.dynamic_slice_in_dim(summaries, first_row[0], batch, axis=0)
    num_kv_heads, rows = summaries.shape[1:3]
    num_blocks = rows * 8 // 15
    units = jnp.where(ranked != 0, num_units(granularity, host_blocks), 0)
    unit_row = first_unit_row(unit_shift(granularity), num_blocks)
    # max(q * lo, q * hi) is q * lo for a negative q and q * hi otherwise, because lo <= hi: one
    # dot product over both halves of a summary row.
    halves = jnp.concatenate([jnp.minimum(q8, 0), jnp.maximum(q8, 0)], axis=-1)
    every_level = jnp.einsum(
        "bkgh,bkuh->bkgu",
        halves.reshape(batch, num_kv_heads, -1, 2 * head_dim),
        summaries.reshape(batch, num_kv_heads, -1, 2 * head_dim),
        preferred_element_type=jnp.int32,
    )
    unit = jnp.arange(num_blocks, dtype=jnp.int32)
    row = jnp.minimum(unit_row[..., None] + unit, rows - 1)
    scores = jnp.take_along_axis(every_level, row[:, :, None, :], axis=-1)
    exists = unit < units[..., None]
    return jnp.where(exists[:, :, None, :], scores, BEYOND).reshape(batch, num_heads, num_blocks)


def _check(
    q8: jax.Array,
    summaries: jax.Array,
    granularity: jax.Array,
    host_blocks: jax.Array,
    first_row: jax.Array | None,
) -> None:
    batch, num_heads, head_dim = q8.shape
    rows = summaries.shape[2]
    num_blocks = rows * 8 // 15
    fits = (
        fits_rows(summaries.shape[0], batch, first_row)
        and summaries.shape[3:] == (2, head_dim)
        and num_blocks % 8 == 0
        and summary_rows(num_blocks) == rows
        and num_heads % summaries.shape[1] == 0
        and granularity.shape == (batch, summaries.shape[1])
        and host_blocks.shape == (batch,)
        and q8.dtype == jnp.int8
        and summaries.dtype == jnp.int8
    )
    if not fits:
        raise ValueError(
            "expected int8 q8 [B, N, H], int8 summaries [B, K, U, 2, H] with K dividing N and "
            "U = 15 / 8 of a multiple of 8 blocks, granularity [B, K], host_blocks [B], got "
            f"{q8.dtype} {q8.shape}, {summaries.dtype} {summaries.shape}, {granularity.shape}, "
            f"{host_blocks.shape}; correct the shapes"
        )
