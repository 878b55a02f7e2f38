"""Selection of units as one Pallas kernel in the Triton style.

XLA makes some forty launches of the search for a threshold, each of which takes longer than its
work. Here one program per query head keeps its scores in registers and does all of it.

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
from pallas_kernels.compat import silence_triton_deprecation, target_platform
from pallas_kernels.registry import UnsupportedImplementationError
from pallas_kernels.scoring import BEYOND

MAX_BLOCKS = 32768
"""Scores of one program, 64 registers of each of its threads: 512K tokens of a sequence."""

_NUM_WARPS = 16
_LOWEST = np.int32(BEYOND)


def select_units_triton(
    scores: jax.Array,
    shift: jax.Array,
    host_blocks: jax.Array,
    k_units: jax.Array,
    shared: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Selects the best units of every query head; see `pallas_kernels.select_units`.

    Args:
      scores: int32 `[B, N, P]`.
      shift: int32 `[B, K]`, log2 of the blocks of a unit.
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
    tasks, kv_heads = shift.size, shift.shape[1]
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
        per_task(shift),
        host_blocks.astype(jnp.int32),
        per_task(shared != 0),
    )
    bitmap = bitmap[..., : num_words(num_blocks)].reshape(batch, num_heads, -1)
    return jax.lax.bitcast_convert_type(bitmap, jnp.uint32)


def _check(num_blocks: int, interpret: bool) -> None:
    if not interpret and target_platform() != "gpu":
        raise UnsupportedImplementationError(
            f"expected a CUDA device, got platform {target_platform()!r}; use 'xla'"
        )
    if num_blocks > MAX_BLOCKS:
        raise UnsupportedImplementationError(
            f"expected at most {MAX_BLOCKS} blocks, got {num_blocks}; use 'xla'"
        )


def _kernel(
    scores_ref: Any,
    k_units_ref: Any,
    shift_ref: Any,
    host_blocks_ref: Any,
    shared_ref: Any,
    bitmap_ref: Any,
    *,
    group: int,
) -> None:
    num_blocks = scores_ref.shape[-1]
    head = pl.program_id(1)
    units = (host_blocks_ref[0] + (jnp.int32(1) << shift_ref[0]) - 1) >> shift_ref[0]
    shared = shared_ref[0] != 0

    def read(unit: jax.Array) -> jax.Array:
        """This head's scores, or the largest of the group's where it ranks once."""
        exists = unit < units
        score = pltriton.load(scores_ref.at[head, unit], mask=exists, other=_LOWEST)
        for other in range(group if group > 1 else 0):
            # Not even read where every head ranks for itself.
            theirs = pltriton.load(scores_ref.at[other, unit], mask=exists & shared, other=_LOWEST)
            score = jnp.maximum(score, theirs)
        return score

    # Scalar conditions are integers here: the backend takes the two constants of a scalar
    # `where` for booleans.
    wanted = k_units_ref[head]
    for other in range(group):
        wanted = jnp.maximum(wanted, shared_ref[0] * k_units_ref[other])
    wanted = jnp.clip(wanted, 0, units)

    width = pl.next_power_of_2(num_blocks)
    unit = jnp.arange(width, dtype=jnp.int32)
    score = read(unit)
    exists = unit < units
    ranked = jnp.clip(wanted, 0, 1) * jnp.clip(units - wanted, 0, 1)

    def count(chosen: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(chosen & exists, jnp.int32(1), jnp.int32(0)))

    def settle_bit(i: jax.Array, threshold: jax.Array) -> jax.Array:
        # Counted from the lowest score, so that setting a bit always raises the threshold.
        candidate = threshold + (jnp.int32(1) << (31 - i))
        return jnp.where(count(score >= candidate) >= wanted, candidate, threshold)

    threshold = jax.lax.fori_loop(0, 32 * ranked, settle_bit, jnp.int32(_LOWEST))
    tied = score == threshold
    room = wanted - count(score > threshold)
    # Of equal scores the lowest ids are taken: those below the largest bound that lets in `room`.
    bits = width.bit_length()

    def settle_bound(i: jax.Array, bound: jax.Array) -> jax.Array:
        candidate = bound + (jnp.int32(1) << (bits - 1 - i))
        return jnp.where(count(tied & (unit < candidate)) <= room, candidate, bound)

    scarce = ranked * jnp.clip(count(tied) - room, 0, 1)
    bound = jax.lax.fori_loop(0, bits * scarce, settle_bound, (1 - scarce) * num_blocks)

    shape = (bitmap_ref.shape[-1], WORD_BITS)
    bit = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    block = jax.lax.broadcasted_iota(jnp.int32, shape, 0) * WORD_BITS + bit
    unit = block >> shift_ref[0]
    score = read(unit)
    best = (score > threshold) | ((score == threshold) & (unit < bound))
    everything = wanted >= units
    selectable = (unit < units) & (block < host_blocks_ref[0]) & (wanted > 0)
    chosen = (best | everything) & selectable
    bitmap_ref[:] = jnp.sum(jnp.where(chosen, jnp.int32(1) << bit, 0), axis=1)
