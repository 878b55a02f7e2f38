"""What is left of a layer's decode step once the host's share is there, in one kernel.

The shares are merged, what went wrong is added up, the exponents take their new values unless
something did, and where summaries live on the device the leaving block enters them. Apart, each of
these is a kernel of its own that everything after it waits for.

Axes: B batch, N query heads, K KV heads, G = N // K, M blocks written at once, U summary rows of
all granularities, H head size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.cache_rows import row_operand, row_spec
from pallas_kernels.compat import silence_triton_deprecation
from pallas_kernels.merge_states import State
from pallas_kernels.registry import require_gpu, traced_once
from pallas_kernels.update_summaries import (
    programs_of_task,
    table_index,
    table_spec,
    update_rows,
)


class SummaryUpdate(NamedTuple):
    """New blocks for the summaries; the fields are those of `pallas_kernels.update_summaries`."""

    summaries: jax.Array
    new: jax.Array
    shift: jax.Array
    first_block: jax.Array
    num_blocks: jax.Array
    first_row: jax.Array | None = None


class FinishedLayer(NamedTuple):
    """What comes out of a layer.

    Attributes:
      out: `[B, N, H]`, the merged attention.
      lse: float32 `[B, N]`; `-inf` where all shares are empty.
      exponents: int32 `[B, K, H]`, in place if the program donates them.
      status: int32 `[1]`.
      summaries: int8 `[B, K, U, 2, H]`, in place if the program donates them, or None.
    """

    out: jax.Array
    lse: jax.Array
    exponents: jax.Array
    status: jax.Array
    summaries: jax.Array | None


@functools.partial(traced_once, constants=["dtype", "interpret"])
def finish_layer(
    states: Sequence[State],
    exponents: jax.Array,
    grown: jax.Array,
    status: jax.Array,
    earlier: Sequence[jax.Array],
    update: SummaryUpdate | None,
    *,
    dtype: str,
    interpret: bool = False,
) -> FinishedLayer:
    """Merges the shares of a layer and takes over what its step has changed.

    Args:
      states: one or more pairs of `out` float32 `[B, N, H]` and `lse` float32 `[B, N]`, merged as
        by `pallas_kernels.merge_states`.
      exponents: int32 `[B, K, H]`, before the step.
      grown: int32 `[B, K, H]`, taken over unless `status` is set.
      status: int32 `[1]`, what went wrong in this step of this layer; with any, no block was
        written.
      earlier: int32 `[X]` each, what else went wrong; it only is added to the status. Entries of
        one array are 0 or all the same.
      update: blocks that enter the summaries unless `status` is set, or None.
      dtype: of the merged output.
      interpret: run on any platform, slowly; for tests.

    Raises:
      UnsupportedImplementationError: not on a GPU.
    """
    require_gpu(interpret, advice="use XLA's operations")
    batch, num_heads, head_dim = states[0][0].shape
    kv_heads = exponents.shape[1]
    tasks, group = batch * kv_heads, num_heads // kv_heads

    def whole_task(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda task, _: (task,) + (0,) * len(shape))

    def head_of(program: jax.Array) -> jax.Array:
        # Programs behind those of the heads have none.
        return jnp.minimum(program, group - 1)

    of_head = pl.BlockSpec((None, None, head_dim), lambda task, i: (task, head_of(i), 0))
    lse_of_head = pl.BlockSpec((None, 1), lambda task, i: (task, head_of(i)))
    channels = whole_task(head_dim)
    once = pl.BlockSpec((1,), lambda task, _: (0,))
    operands: list[jax.Array] = [status, *earlier]
    in_specs = [pl.BlockSpec(x.shape, lambda task, _: (0,)) for x in operands]
    for out, lse in states:
        operands += [out.reshape(tasks, group, head_dim), lse.reshape(tasks, group)]
        in_specs += [of_head, lse_of_head]
    # In place, or XLA would copy those of a cache that the program takes over.
    aliases = {len(operands): 2}
    operands += [exponents.reshape(tasks, head_dim), grown.reshape(tasks, head_dim)]
    in_specs += [channels, channels]
    out_specs = [of_head, lse_of_head, channels, once]
    out_shape = [
        jax.ShapeDtypeStruct((tasks, group, head_dim), dtype),
        jax.ShapeDtypeStruct((tasks, group), jnp.float32),
        jax.ShapeDtypeStruct((tasks, head_dim), jnp.int32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    ]
    programs = 0
    if update is not None:
        rows = update.summaries.shape[2]
        programs = programs_of_task(tasks, rows)
        table = table_spec(update.summaries, update.first_row)
        row = pl.BlockSpec((1,), lambda task, _: (task // kv_heads,))
        aliases[len(operands)] = len(out_shape)
        operands += [
            update.summaries.reshape(-1, rows, 2, head_dim),
            update.new.reshape(tasks, *update.new.shape[2:]),
            update.shift.reshape(tasks, head_dim),
            update.first_block.astype(jnp.int32),
            update.num_blocks.astype(jnp.int32),
            *row_operand(update.first_row),
        ]
        in_specs += [table, whole_task(*update.new.shape[2:]), channels, row, row]
        in_specs += row_spec(update.first_row)
        out_specs.append(table)
        all_tasks = len(update.summaries) * kv_heads
        out_shape.append(jax.ShapeDtypeStruct((all_tasks, rows, 2, head_dim), jnp.int8))
    silence_triton_deprecation()
    out, lse, exponents, status, *rest = pl.pallas_call(
        functools.partial(
            _kernel,
            kv_heads=kv_heads,
            group=group,
            statuses=1 + len(earlier),
            states=len(states),
            programs=programs,
        ),
        grid=(tasks, group + programs),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        input_output_aliases=aliases,
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="finish_layer",
    )(*operands)
    return FinishedLayer(
        out.reshape(batch, num_heads, head_dim),
        lse.reshape(batch, num_heads),
        exponents.reshape(batch, kv_heads, head_dim),
        status,
        None if update is None else rest[0].reshape(update.summaries.shape),
    )


def _kernel(
    *refs: Any, kv_heads: int, group: int, statuses: int, states: int, programs: int
) -> None:
    """A query head's merge, of which a task's first also does what is small; then the summaries."""
    refs, results = refs[: -(4 + (programs > 0))], refs[-(4 + (programs > 0)) :]
    (status_ref, *earlier), refs = refs[:statuses], refs[statuses:]
    shares, (old_ref, grown_ref, *update) = refs[: 2 * states], refs[2 * states :]
    out_ref, lse_ref, exponents_ref, all_status_ref, *summaries = results
    task, program = pl.program_id(0), pl.program_id(1)
    head_dim = out_ref.shape[0]
    channel = jnp.arange(pl.next_power_of_2(head_dim), dtype=jnp.int32)
    in_head = channel < head_dim
    status = status_ref[0]

    @pl.when(program < group)
    def _() -> None:
        outs = [pltriton.load(ref.at[channel], mask=in_head, other=0.0) for ref in shares[::2]]
        lses = [ref[0] for ref in shares[1::2]]
        largest = functools.reduce(jnp.maximum, lses)
        # All sets may be empty: -inf - (-inf) would be NaN.
        finite = jnp.where(largest == -jnp.inf, jnp.float32(0.0), largest)
        weights = [jnp.exp(lse - finite) for lse in lses]
        total = functools.reduce(jnp.add, weights)
        # What an empty set's output is does not matter, even if it is not finite.
        terms = [
            weight * jnp.where(jnp.broadcast_to(lse == -jnp.inf, out.shape), 0.0, out)
            for weight, lse, out in zip(weights, lses, outs, strict=True)
        ]
        divisor = jnp.where(total == 0.0, jnp.float32(1.0), total)
        merged = functools.reduce(jnp.add, terms) / divisor
        pltriton.store(out_ref.at[channel], merged.astype(out_ref.dtype), mask=in_head)
        lse_ref[0] = jnp.where(total == 0.0, -jnp.inf, finite + jnp.log(divisor))

    @pl.when(program == 0)
    def _() -> None:
        old, grown = (
            pltriton.load(ref.at[channel], mask=in_head, other=0) for ref in (old_ref, grown_ref)
        )
        failed = jnp.broadcast_to(status != 0, channel.shape)
        pltriton.store(exponents_ref.at[channel], jnp.where(failed, old, grown), mask=in_head)

    @pl.when((program == 0) & (task == 0))
    def _() -> None:
        all_status_ref[0] = functools.reduce(jnp.bitwise_or, [status, *map(_any_of, earlier)])

    if programs:
        _, new_ref, shift_ref, first_block_ref, num_blocks_ref, *row_refs = update

        @pl.when(program >= group)
        def _() -> None:
            update_rows(
                summaries[0],
                new_ref,
                shift_ref,
                first_block_ref[0],
                num_blocks_ref[0],
                status,
                program - group,
                programs,
                table_index(task, kv_heads, row_refs),
            )


def _any_of(ref: Any) -> jax.Array:
    """The number that some entries have and the others are 0."""
    (size,) = ref.shape
    if size == 1:
        return ref[0]
    entry = jnp.arange(pl.next_power_of_2(size), dtype=jnp.int32)
    return jnp.max(pltriton.load(ref.at[entry], mask=entry < size, other=0))
