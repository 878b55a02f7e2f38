"""Summaries of new blocks enter those that live on the device, by two Pallas kernels.

XLA writes them in loops whose numbers of iterations are data. On a GPU the host waits for each of
these numbers, in every layer of every step; a kernel looks at them itself.

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

from pallas_kernels.compat import silence_triton_deprecation, target_platform
from pallas_kernels.registry import UnsupportedImplementationError

TILE_ROWS = 64
"""Rows that one program requantises."""

_LEVELS = 4


def update_summaries(
    summaries: jax.Array,
    new: jax.Array,
    shift: jax.Array,
    first_block: jax.Array,
    num_blocks: jax.Array,
    status: jax.Array,
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
      interpret: run on any platform, slowly; for tests.

    Returns:
      The new summaries, in place if the program donates them. Rows of blocks that were never
      written are unspecified.

    Raises:
      UnsupportedImplementationError: not on a GPU.
    """
    if not interpret and target_platform() != "gpu":
        raise UnsupportedImplementationError(
            f"expected a CUDA device, got platform {target_platform()!r}; write them with XLA"
        )
    silence_triton_deprecation()
    batch, kv_heads, rows, _, head_dim = summaries.shape
    tasks = batch * kv_heads

    def whole_task(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda task, *_: (task,) + (0,) * len(shape))

    per_row = pl.BlockSpec((1,), lambda task, *_: (task // kv_heads,))
    once = pl.BlockSpec((1,), lambda *_: (0,))
    table = whole_task(rows, 2, head_dim)
    call = functools.partial(
        pl.pallas_call,
        out_specs=table,
        out_shape=jax.ShapeDtypeStruct((tasks, rows, 2, head_dim), jnp.int8),
        input_output_aliases={0: 0},
        interpret=interpret,
    )
    summaries = call(
        _requantise,
        grid=(tasks, pl.cdiv(rows, TILE_ROWS)),
        in_specs=[table, whole_task(head_dim), per_row, once],
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        name="requantise_summaries",
    )(
        summaries.reshape(tasks, rows, 2, head_dim),
        shift.reshape(tasks, head_dim),
        num_blocks.astype(jnp.int32),
        status,
    )
    summaries = call(
        _store,
        grid=(tasks,),
        in_specs=[table, whole_task(*new.shape[2:]), per_row, per_row, once],
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        name="write_summaries",
    )(
        summaries,
        new.reshape(tasks, *new.shape[2:]),
        first_block.astype(jnp.int32),
        num_blocks.astype(jnp.int32),
        status,
    )
    return summaries.reshape(batch, kv_heads, rows, 2, head_dim)


def _channels(head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Channel numbers, in an array whose size is a power of two, and which of them exist."""
    channel = jnp.arange(pl.next_power_of_2(head_dim), dtype=jnp.int32)
    return channel, channel < head_dim


def _written(num_blocks_ref: Any, status_ref: Any) -> jax.Array:
    # A scalar `where` of constants would be taken for one of booleans.
    return num_blocks_ref[0] * (1 - jnp.clip(status_ref[0], 0, 1))


def _requantise(
    old_ref: Any, shift_ref: Any, num_blocks_ref: Any, status_ref: Any, out_ref: Any
) -> None:
    """Rounds the bounds of one tile of rows outwards to the larger steps of their channels."""
    del old_ref  # The same memory as the result.
    rows, _, head_dim = out_ref.shape
    channel, exists = _channels(head_dim)
    shift = pltriton.load(shift_ref.at[channel], mask=exists, other=0)
    grown = jnp.clip(jnp.max(shift), 0, 1) * jnp.clip(_written(num_blocks_ref, status_ref), 0, 1)
    row = pl.program_id(1) * TILE_ROWS + jnp.arange(TILE_ROWS, dtype=jnp.int32)
    shape = (TILE_ROWS, channel.size)
    # Where nothing has grown, nothing is read either.
    wanted = (row < rows * grown)[:, None] & exists[None, :]
    wanted = jnp.broadcast_to(wanted, shape)
    row = jnp.broadcast_to(row[:, None], shape)
    columns = jnp.broadcast_to(channel[None, :], shape)
    steps = jnp.broadcast_to(jnp.minimum(shift, 31)[None, :], shape)
    low = pltriton.load(out_ref.at[row, 0, columns], mask=wanted, other=0).astype(jnp.int32)
    high = pltriton.load(out_ref.at[row, 1, columns], mask=wanted, other=0).astype(jnp.int32)
    low, high = low >> steps, -(-high >> steps)
    pltriton.store(out_ref.at[row, 0, columns], low.astype(jnp.int8), mask=wanted)
    pltriton.store(out_ref.at[row, 1, columns], high.astype(jnp.int8), mask=wanted)


def _store(
    old_ref: Any,
    new_ref: Any,
    first_block_ref: Any,
    num_blocks_ref: Any,
    status_ref: Any,
    out_ref: Any,
) -> None:
    """Writes the rows of one task: the first block of a unit overwrites, later ones fold."""
    del old_ref  # The same memory as the result.
    rows, _, head_dim = out_ref.shape
    capacity = rows * 8 // 15
    channel, exists = _channels(head_dim)
    first = first_block_ref[0]

    def write(i: jax.Array, nothing: jax.Array) -> jax.Array:
        block = first + i
        new_low, new_high = (
            pltriton.load(new_ref.at[i, half, channel], mask=exists, other=0).astype(jnp.int32)
            for half in (0, 1)
        )
        offset = 0
        for level in range(_LEVELS):
            row = offset + (block >> level)
            folds = jnp.broadcast_to((block & ((1 << level) - 1)) != 0, channel.shape)
            at_low, at_high = out_ref.at[row, 0, channel], out_ref.at[row, 1, channel]
            low = pltriton.load(at_low, mask=exists & folds, other=127).astype(jnp.int32)
            high = pltriton.load(at_high, mask=exists & folds, other=-127).astype(jnp.int32)
            low, high = jnp.minimum(low, new_low), jnp.maximum(high, new_high)
            pltriton.store(at_low, low.astype(jnp.int8), mask=exists)
            pltriton.store(at_high, high.astype(jnp.int8), mask=exists)
            offset += capacity >> level
        return nothing

    jax.lax.fori_loop(0, _written(num_blocks_ref, status_ref), write, jnp.int32(0))
