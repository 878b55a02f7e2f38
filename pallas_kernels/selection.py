"""Selection of the best units of every query head, exact for any number of them.

The number of wanted units is data, so `lax.top_k` cannot do it. Instead the k-th largest score is
found digit by digit, everything above it is taken, and ties are taken from the lowest id on.

Axes: B batch, N query heads, K KV heads, G = N // K, P blocks, W bitmap words.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.bitmaps import pack, rank
from pallas_kernels.registry import Implementation, dispatch
from pallas_kernels.scoring import num_units, unit_shift

DIGIT_BITS = 2
"""Bits of the threshold that one pass over the scores settles. A pass with b bits compares every
score 2 ** b - 1 times; on a CPU and on an H100, 2 was faster than 4 and 8."""


def select_units(
    scores: jax.Array,
    granularity: jax.Array,
    host_blocks: jax.Array,
    k_units: jax.Array,
    shared: jax.Array,
    *,
    implementation: Implementation = None,
) -> jax.Array:
    """Selects the `k_units` best units of every query head and marks their blocks.

    Args:
      scores: int32 `[B, N, P]`, entry `u` belongs to unit `u`; any int32 is a valid score.
      granularity: int32 `[B, K]`, tokens of a unit: 16, 32, 64 or 128.
      host_blocks: int32 `[B]`, selectable blocks; no block from there on is ever selected.
      k_units: int32 `[B, N]`, units wanted; clipped to what exists.
      shared: int32 or bool `[B, K]`; where set, the group ranks once by the maximum over its
        heads, takes the largest of their `k_units`, and all its heads get the same units.
      implementation: "triton" runs on a GPU, up to 32768 blocks; "xla" runs everywhere; None for
        the best available.

    Returns:
      uint32 `[B, N, W]`: the blocks of the selected units. Ties go to the lowest unit id.

    Raises:
      ValueError: if the shapes do not fit together.
      UnsupportedImplementationError: if no implementation asked for works here.
    """
    _check(scores, granularity, host_blocks, k_units, shared)
    candidates: dict[str, Callable[..., jax.Array]] = {"triton": _triton, "xla": _xla}
    arguments = (scores, granularity, host_blocks, k_units, shared)
    return dispatch("select_units", implementation, candidates, *arguments)  # type: ignore[no-any-return]


def _triton(*arguments: jax.Array) -> jax.Array:
    from pallas_kernels.selection_triton import select_units_triton

    return select_units_triton(*arguments)


def _xla(
    scores: jax.Array,
    granularity: jax.Array,
    host_blocks: jax.Array,
    k_units: jax.Array,
    shared: jax.Array,
) -> jax.Array:
    batch, num_heads, num_blocks = scores.shape
    units, shift = num_units(granularity, host_blocks), unit_shift(granularity)
    num_kv_heads = units.shape[1]
    grouped = scores.reshape(batch, num_kv_heads, -1, num_blocks)
    wanted = k_units.reshape(batch, num_kv_heads, -1)
    share = shared.astype(jnp.bool_)[..., None]
    grouped = jnp.where(share[..., None], jnp.max(grouped, axis=2, keepdims=True), grouped)
    wanted = jnp.where(share, jnp.max(wanted, axis=2, keepdims=True), wanted)

    block = jnp.arange(num_blocks, dtype=jnp.int32)
    exists = (block < units[..., None])[:, :, None, :]
    best = _take_best(grouped, exists, jnp.clip(wanted, 0, units[..., None]))

    unit_of_block = block >> shift[..., None]
    expanded = jnp.take_along_axis(best, unit_of_block[:, :, None, :], axis=-1)
    selectable = (block < host_blocks[:, None])[:, None, None, :]
    return pack(expanded & selectable).reshape(batch, num_heads, -1)


def _take_best(scores: jax.Array, exists: jax.Array, wanted: jax.Array) -> jax.Array:
    # Flipping the sign bit makes unsigned order equal to signed order. What does not exist gets
    # key 0, which no candidate threshold reaches.
    key = jax.lax.bitcast_convert_type(scores, jnp.uint32) ^ jnp.uint32(0x80000000)
    key = jnp.where(exists, key, jnp.uint32(0))
    threshold = jnp.zeros(wanted.shape, jnp.uint32)
    for shift in range(32 - DIGIT_BITS, -1, -DIGIT_BITS):
        digits = jnp.arange(1, 1 << DIGIT_BITS, dtype=jnp.uint32) << shift
        candidates = threshold[..., None] + digits
        reached = jnp.sum(key[..., None, :] >= candidates[..., None], axis=-1, dtype=jnp.int32)
        digit = jnp.sum(reached >= wanted[..., None], axis=-1, dtype=jnp.uint32)
        threshold = threshold + (digit << shift)
    above = key > threshold[..., None]
    tied = (key == threshold[..., None]) & exists
    room = wanted - jnp.sum(above, axis=-1, dtype=jnp.int32)
    return above | (tied & (rank(pack(tied), tied.shape[-1]) < room[..., None]))


def _check(
    scores: jax.Array,
    granularity: jax.Array,
    host_blocks: jax.Array,
    k_units: jax.Array,
    shared: jax.Array,
) -> None:
    fits = (
        scores.ndim == 3
        and granularity.ndim == 2
        and scores.dtype == jnp.int32
        and granularity.shape[0] == scores.shape[0]
        and scores.shape[1] % granularity.shape[1] == 0
        and shared.shape == granularity.shape
        and host_blocks.shape == scores.shape[:1]
        and k_units.shape == scores.shape[:2]
    )
    if not fits:
        raise ValueError(
            "expected int32 scores [B, N, P], granularity and shared [B, K] with K dividing N, "
            f"host_blocks [B], k_units [B, N], got {scores.dtype} {scores.shape}, "
            f"{granularity.shape}, {shared.shape}, {host_blocks.shape}, {k_units.shape}; correct "
            "the shapes"
        )
