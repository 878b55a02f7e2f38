"""Summaries of new blocks enter those that live on the device, in one Pallas kernel.

XLA writes them in loops whose numbers of iterations are data. On a GPU the host waits for each of
these numbers, in every layer of every step; a kernel looks at them itself. In nearly every step
there is nothing to do, so the kernel has few programs, whose loops then end at once.

Axes: B batch, K KV heads, M blocks written at once, U summary rows of all granularities, H head
size.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.cache_rows import check_offsets, row_operand, row_spec
from pallas_kernels.compat import silence_triton_deprecation
from pallas_kernels.registry import require_gpu, traced_once

TILE_ROWS = 64
"""Rows that a program requantises at a time."""

MAX_PROGRAMS = 256
"""About two for each multiprocessor; those of a task share its rows."""

_LEVELS = 4


@functools.partial(traced_once, constants=["interpret"])
def update_summaries(
    summaries: jax.Array,
    new: jax.Array,
    shift: jax.Array,
    first_block: jax.Array,
    num_blocks: jax.Array,
    status: jax.Array,
    first_row: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Requantises summaries and writes those of new blocks, at all four granularities.

    Args:
      summaries: int8 `[B, K, U, 2, H]`, lower bounds at index 0 and upper bounds at index 1.
      new: int8 `[B, K, M, 2, H]`, of the new blocks, quantised under the new exponents.
      shift: int32 `[B, K, H]`, by how much a channel's exponent grew.
      first_block: int32 `[B]`, where the first of them goes.
      num_blocks: int32 `[B]`, how many of the `M` are written; a row of 0 stays as it is.
      status: int32 `[1]`; nothing is written unless it is 0.
      first_row: int32 `[1]` if `summaries` hold several layers, as `[R, K, U, 2, H]` with R >= B:
        the B rows from this one on change, which must be there. None for those of one layer.
      interpret: run on any platform, slowly; for tests.

    Returns:
      The new summaries, in place if the program donates them. Rows of blocks that were never
      written are unspecified.

    Raises:
      UnsupportedImplementationError: not on a GPU, or sizes that Triton takes wrongly.
    """
    require_gpu(interpret, advice="write them with XLA")
    check_offsets(summaries)
    silence_triton_deprecation()
    kv_heads, rows, _, head_dim = summaries.shape[1:]
    tasks = new.shape[0] * kv_heads

    def whole_task(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda task, *_: (task,) + (0,) * len(shape))

    per_row = pl.BlockSpec((1,), lambda task, *_: (task // kv_heads,))
    once = pl.BlockSpec((1,), lambda *_: (0,))
    table = table_spec(summaries, first_row)
    programs = programs_of_task(tasks, rows)
    changed = pl.pallas_call(
        functools.partial(_kernel, kv_heads=kv_heads, programs=programs),
        grid=(tasks, programs),
        in_specs=[
            table,
            whole_task(*new.shape[2:]),
            whole_task(head_dim),
            *[per_row] * 2,
            once,
            *row_spec(first_row),
        ],
        out_specs=table,
        out_shape=jax.ShapeDtypeStruct((len(summaries) * kv_heads, rows, 2, head_dim), jnp.int8),
        input_output_aliases={0: 0},
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="update_summaries",
    )(
        summaries.reshape(-1, rows, 2, head_dim),
        new.reshape(tasks, *new.shape[2:]),
        shift.reshape(tasks, head_dim),
        first_block.astype(jnp.int32),
        num_blocks.astype(jnp.int32),
        status,
        *row_operand(first_row),
    )
    return changed.reshape(summaries.shape)


def table_spec(summaries: jax.Array, first_row: jax.Array | None) -> pl.BlockSpec:
    """What a program sees of `[R * K, U, 2, H]`: its task's rows, or all, with `table_index`."""
    _, kv_heads, rows, _, head_dim = summaries.shape
    if first_row is None:
        return pl.BlockSpec((None, rows, 2, head_dim), lambda task, _: (task, 0, 0, 0))
    return pl.BlockSpec((len(summaries) * kv_heads, rows, 2, head_dim), lambda *_: (0, 0, 0, 0))


def table_index(task: jax.Array, kv_heads: int, row_refs: list[Any]) -> tuple[jax.Array, ...]:
    """Within a kernel: the index that leads from what `table_spec` shows to a task's rows."""
    return tuple(ref[0] * kv_heads + task for ref in row_refs)


def _kernel(
    old_ref: Any,
    new_ref: Any,
    shift_ref: Any,
    first_block_ref: Any,
    num_blocks_ref: Any,
    status_ref: Any,
    *refs: Any,
    kv_heads: int,
    programs: int,
) -> None:
    del old_ref  # The same memory as the result.
    *row_refs, out_ref = refs
    update_rows(
        out_ref,
        new_ref,
        shift_ref,
        first_block_ref[0],
        num_blocks_ref[0],
        status_ref[0],
        pl.program_id(1),
        programs,
        table_index(pl.program_id(0), kv_heads, row_refs),
    )


def programs_of_task(tasks: int, rows: int) -> int:
    """How many programs share the rows of a task."""
    return max(1, min(pl.cdiv(rows, TILE_ROWS), MAX_PROGRAMS // tasks))


def update_rows(
    out_ref: Any,
    new_ref: Any,
    shift_ref: Any,
    first: jax.Array,
    num_blocks: jax.Array,
    status: jax.Array,
    program: jax.Array,
    programs: int,
    own: tuple[jax.Array, ...] = (),
) -> None:
    """A program's part of a task, within a kernel.

    It rescales every row but those of the new blocks; the first program does both to these.

    Args:
      out_ref: int8 `[U, 2, H]`, changed in place.
      new_ref: int8 `[M, 2, H]`.
      shift_ref: int32 `[H]`.
      first: int32 scalar, where the first block goes.
      num_blocks: int32 scalar, blocks to write.
      status: int32 scalar; nothing is written unless it is 0.
      program: int32 scalar, which of the task's programs this is.
      programs: how many there are.
      own: index of the task's `[U, 2, H]` within `out_ref`, if that is more.
    """
    rows, _, head_dim = out_ref.shape[-3:]
    capacity = rows * 8 // 15
    # Triton's arrays have sizes that are powers of two.
    channel = jnp.arange(pl.next_power_of_2(head_dim), dtype=jnp.int32)
    exists = channel < head_dim
    # A scalar `where` of constants would be taken for one of booleans.
    written = num_blocks * (1 - jnp.clip(status, 0, 1))
    last = first + written - 1
    shift = jnp.minimum(pltriton.load(shift_ref.at[channel], mask=exists, other=0), 31)
    # Where no block is written no row may change, and where no channel grew none has to.
    grown = jnp.clip(jnp.max(shift), 0, 1) * jnp.clip(written, 0, 1)
    starts = [2 * capacity - (2 * capacity >> level) for level in range(_LEVELS)]
    shape = (TILE_ROWS, channel.size)
    columns = jnp.broadcast_to(channel[None, :], shape)
    steps = jnp.broadcast_to(shift[None, :], shape)

    def requantise(tile: jax.Array, nothing: jax.Array) -> jax.Array:
        row = (program + tile * programs) * TILE_ROWS
        row = row + jnp.arange(TILE_ROWS, dtype=jnp.int32)
        wanted = row < rows
        for level, start in enumerate(starts):
            wanted &= (row < start + (first >> level)) | (row > start + (last >> level))
        wanted = jnp.broadcast_to(wanted[:, None] & exists[None, :], shape)
        row = jnp.broadcast_to(row[:, None], shape)
        at_low, at_high = (out_ref.at[(*own, row, half, columns)] for half in (0, 1))
        low = pltriton.load(at_low, mask=wanted, other=0).astype(jnp.int32)
        high = pltriton.load(at_high, mask=wanted, other=0).astype(jnp.int32)
        low, high = _rescaled(low, high, steps)
        pltriton.store(at_low, low.astype(jnp.int8), mask=wanted)
        pltriton.store(at_high, high.astype(jnp.int8), mask=wanted)
        return nothing

    tiles = pl.cdiv(rows, TILE_ROWS * programs)
    jax.lax.fori_loop(0, tiles * grown, requantise, jnp.int32(0))

    def write(i: jax.Array, nothing: jax.Array) -> jax.Array:
        """The first block of a unit overwrites, later ones fold."""
        block = first + i
        new_low, new_high = (
            pltriton.load(new_ref.at[i, half, channel], mask=exists, other=0).astype(jnp.int32)
            for half in (0, 1)
        )
        # What an earlier iteration wrote has the new scale already.
        due = jnp.broadcast_to(i == 0, channel.shape)
        due_shift = jnp.where(due, shift, 0)
        for level, start in enumerate(starts):
            row = start + (block >> level)
            folds = jnp.broadcast_to((block & ((1 << level) - 1)) != 0, channel.shape)
            at_low, at_high = (out_ref.at[(*own, row, half, channel)] for half in (0, 1))
            low = pltriton.load(at_low, mask=exists & folds, other=0).astype(jnp.int32)
            high = pltriton.load(at_high, mask=exists & folds, other=0).astype(jnp.int32)
            low, high = _rescaled(low, high, due_shift)
            low = jnp.where(folds, jnp.minimum(low, new_low), new_low)
            high = jnp.where(folds, jnp.maximum(high, new_high), new_high)
            pltriton.store(at_low, low.astype(jnp.int8), mask=exists)
            pltriton.store(at_high, high.astype(jnp.int8), mask=exists)
        return nothing

    mine = 1 - jnp.clip(program, 0, 1)
    jax.lax.fori_loop(0, written * mine, write, jnp.int32(0))


def _rescaled(low: jax.Array, high: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Bounds rounded outwards to the larger steps of their channels."""
    return low >> shift, -(-high >> shift)
