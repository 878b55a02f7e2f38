"""Selection of units as one Pallas kernel in the Triton style.

XLA makes some forty launches of the search for a threshold, each of which takes longer than its
work. Here one program per query head keeps its scores in registers and does all of it. Most of a
pass over them is spent on summing over the threads, so each counts two candidates in the halves of
one word, and the search ends with the first that is exact.

Axes: B batch, N query heads, K KV heads, G = N // K, P blocks, W bitmap words.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.bitmaps import WORD_BITS, num_words
from pallas_kernels.compat import silence_triton_deprecation
from pallas_kernels.registry import UnsupportedImplementationError, require_gpu
from pallas_kernels.scoring import BEYOND, unit_shift

MAX_BLOCKS = 32768
"""Scores of one program, 64 registers of each of its threads: 512K tokens of a sequence."""

_NUM_WARPS = 16
_LOWEST = np.int32(BEYOND)
_HALF_BITS = 16


def select_units_triton(
    scores: jax.Array,
    granularity: jax.Array,
    host_blocks: jax.Array,
    k_units: jax.Array,
    shared: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Selects the best units of every query head; see `pallas_kernels.select_units`.

    Args:
      scores: int32 `[B, N, P]`.
      granularity: int32 `[B, K]`, tokens of a unit.
      host_blocks: int32 `[B]`.
      k_units: int32 `[B, N]`.
      shared: bool `[B, K]`.
      interpret: run on any platform, slowly; for tests.

    Returns:
      uint32 `[B, N, W]`.

    Raises:
      UnsupportedImplementationError: not on a GPU, or too many blocks.
    """
    batch, num_heads, num_blocks = scores.shape
    _check(num_blocks, interpret)
    tasks, kv_heads = granularity.size, granularity.shape[1]
    group = num_heads // kv_heads
    words = pl.next_power_of_2(num_words(num_blocks))

    def whole_task(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda task, _: (task,) + (0,) * len(shape))

    def per_task(x: jax.Array) -> jax.Array:
        return x.astype(jnp.int32).reshape(tasks)

    scalar = pl.BlockSpec((1,), lambda task, _: (task,))
    row = pl.BlockSpec((1,), lambda task, _: (task // kv_heads,))
    silence_triton_deprecation()
    bitmap = pl.pallas_call(
        functools.partial(_kernel, group=group),
        grid=(tasks, group),
        in_specs=[whole_task(group, num_blocks), whole_task(group), scalar, row, scalar],
        out_specs=pl.BlockSpec((None, None, words), lambda task, head: (task, head, 0)),
        out_shape=jax.ShapeDtypeStruct((tasks, group, words), jnp.int32),
        compiler_params=pltriton.CompilerParams(num_warps=_NUM_WARPS, num_stages=1),
        interpret=interpret,
        name="select_units",
    )(
        scores.reshape(tasks, group, num_blocks),
        k_units.reshape(tasks, group),
        per_task(granularity),
        host_blocks.astype(jnp.int32),
        per_task(shared != 0),
    )
    bitmap = bitmap[..., : num_words(num_blocks)].reshape(batch, num_heads, -1)
    return jax.lax.bitcast_convert_type(bitmap, jnp.uint32)


def _check(num_blocks: int, interpret: bool) -> None:
    require_gpu(interpret)
    if num_blocks > MAX_BLOCKS:
        raise UnsupportedImplementationError(
            f"expected at most {MAX_BLOCKS} blocks, got {num_blocks}; use 'xla'"
        )


def _kernel(
    scores_ref: Any,
    k_units_ref: Any,
    granularity_ref: Any,
    host_blocks_ref: Any,
    shared_ref: Any,
    bitmap_ref: Any,
    *,
    group: int,
) -> None:
    head = pl.program_id(1)
    shift = unit_shift(granularity_ref[0])
    host_blocks, shared = host_blocks_ref[0], shared_ref[0]
    units = (host_blocks + (jnp.int32(1) << shift) - 1) >> shift
    # Scalar conditions are integers here: the backend takes the two constants of a scalar
    # `where` for booleans.
    wanted = k_units_ref[head]
    for other in range(group):
        wanted = jnp.maximum(wanted, shared * k_units_ref[other])
    wanted = jnp.clip(wanted, 0, units)
    ranked = jnp.clip(wanted, 0, 1) * jnp.clip(units - wanted, 0, 1)

    # Each block has its unit's score, so that counts are of units times the blocks of a unit; the
    # last unit may end behind the host's last block.
    words = bitmap_ref.shape[0]
    block = jnp.arange(words * WORD_BITS, dtype=jnp.int32)
    unit = block >> shift
    exists = unit < units
    score = pltriton.load(scores_ref.at[head, unit], mask=exists, other=_LOWEST)
    for i in range(1, group):
        # Not even read where every head ranks for itself.
        peer, mask = jax.lax.rem(head + i, jnp.int32(group)), exists & (shared != 0)
        theirs = pltriton.load(scores_ref.at[peer, unit], mask=mask, other=_LOWEST)
        score = jnp.maximum(score, theirs)

    least = jnp.min(jnp.where(exists, score, jnp.int32(2**31 - 1)))
    key = jnp.where(exists, (score - least) ^ _LOWEST, _LOWEST)
    span = (jnp.max(key) ^ _LOWEST) * ranked
    wanted_blocks = wanted << shift
    threshold, reached = _threshold(key, span, wanted_blocks, units << shift)

    tied = exists & (key == threshold)
    # Of equal scores the lowest ids are taken, where there are more than wanted.
    scarce = ranked * jnp.clip(reached - wanted_blocks, 0, 1)
    above = jnp.sum(jnp.where(key > threshold, jnp.int32(1), jnp.int32(0)))
    last = block.shape[0] - 1
    early = jnp.where(tied, (last - block) ^ _LOWEST, _LOWEST)
    bound, _ = _threshold(early, last * scarce, wanted_blocks - above, reached - above)

    best = (key > threshold) | (tied & (early >= bound))
    chosen = (best | (wanted >= units)) & (block < host_blocks) & (wanted > 0)
    bits = jnp.where(chosen, jnp.int32(1) << (block & (WORD_BITS - 1)), 0)
    bitmap_ref[:] = jnp.sum(bits.reshape(words, WORD_BITS), axis=1)


def _threshold(
    key: jax.Array, span: jax.Array, wanted: jax.Array, reached: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The largest threshold that at least `wanted` keys reach, or any that exactly so many do.

    Args:
      key: int32, counted from the smallest int32, which stands for what is not there.
      span: int32 scalar, taken as unsigned: the largest key less the smallest int32; 0 for none.
      wanted: int32 scalar.
      reached: int32 scalar, keys that are there, at least `wanted`.

    Returns:
      The threshold, and how many keys reach it.
    """

    def unsettled(state: tuple[Any, ...]) -> jax.Array:
        _, span, reached = state
        return (span != 0) & (reached != wanted)

    def narrow(state: tuple[Any, ...]) -> tuple[Any, ...]:
        """The threshold is in `low` to `low + span`; two candidates cut that into thirds."""
        low, span, reached = state
        near = sum(jax.lax.shift_right_logical(span, jnp.int32(i)) for i in (2, 4, 6)) + 1
        far = jnp.minimum(2 * near, span)
        one = jnp.where(key >= low + near, jnp.int32(1), jnp.int32(0))
        two = jnp.where(key >= low + far, jnp.int32(1 << _HALF_BITS), jnp.int32(0))
        both = jnp.sum(one + two)
        over_near = both & ((1 << _HALF_BITS) - 1)
        over_far = jax.lax.shift_right_logical(both, jnp.int32(_HALF_BITS))
        beyond = (low + far, span - far, over_far)
        between = (low + near, far - near - 1, over_near)
        below = (low, near - 1, reached)
        return tuple(
            jnp.where(over_far >= wanted, x, jnp.where(over_near >= wanted, y, z))
            for x, y, z in zip(beyond, between, below, strict=True)
        )

    start: tuple[Any, ...] = (jnp.int32(_LOWEST), span, reached)
    threshold, _, reached = jax.lax.while_loop(unsettled, narrow, start)
    return threshold, reached
