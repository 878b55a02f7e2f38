"""A layer's plan as units of its heads, and how far each task goes to the host, in one kernel.

XLA takes a kernel for the numbers of tasks, one for those of heads, one for each sum over the
tasks, and one behind each of them.

Axes: B batch, N query heads, K KV heads, G = N // K, T = B * K tasks.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.compat import silence_triton_deprecation
from pallas_kernels.registry import UnsupportedImplementationError, require_gpu, traced_once

# Of which all pairs fit into registers.
_MOST_TASKS = 128


class Division(NamedTuple):
    """What a plan comes to.

    Attributes:
      granularity: int32 `[B, K]`, the smallest one where the plan's is unknown.
      status: int32 `[B, K]`, `unknown_status` where the plan's granularity is unknown, else 0.
      k_units: int32 `[B, N]`, units that each head selects.
      ranked_units: int32 `[B, K]`, units that have to be scored; none where all or nothing is
        selected.
      boundary: int32 `[B, K]`, blocks with an id below it are the host's.
    """

    granularity: jax.Array
    status: jax.Array
    k_units: jax.Array
    ranked_units: jax.Array
    boundary: jax.Array


@functools.partial(
    traced_once,
    constants=[
        "granularities",
        "unknown_status",
        "sides",
        "block_bytes",
        "scanned_bytes",
        "least",
        "interpret",
    ],
)
def divide_work(
    granularity: jax.Array,
    budget_tokens: jax.Array,
    shared: jax.Array,
    host_blocks: jax.Array,
    everything: jax.Array,
    share: jax.Array,
    ahead: jax.Array,
    *,
    granularities: tuple[int, ...],
    unknown_status: int,
    sides: str,
    block_bytes: int,
    scanned_bytes: int,
    least: float,
    interpret: bool = False,
) -> Division:
    """Counts units, and gives the host `(total + ahead) * share` of the bytes, at most all.

    Tasks are taken by their bytes, equal ones by index; at most one is cut.

    Args:
      granularity: int32 `[B, K]`, tokens of a unit.
      budget_tokens: int32 `[B, N]`; rounded up to units and cut to what there is.
      shared: int32 `[B, K]`, not 0 where all heads of a group select the same units.
      host_blocks: int32 `[B]`, blocks that can be selected.
      everything: int32 `[B]`, not 0 where every head selects all of them.
      share: float32 scalar, 0 to 1.
      ahead: float32 scalar, bytes.
      granularities: that are known, each twice the one before; the first are the tokens of a
        block, a power of two.
      unknown_status: status of a granularity that is not among them.
      sides: "both", or the only one that has work: "host" or "device".
      block_bytes: of a block that is read.
      scanned_bytes: for each unit of a task that has to rank them.
      least: fewer bytes than this of a task go with the rest of it.
      interpret: run on any platform, slowly; for tests.

    Raises:
      UnsupportedImplementationError: not on a GPU, or too many tasks.
    """
    require_gpu(interpret, advice="divide with XLA")
    batch, kv_heads = granularity.shape
    tasks, group = batch * kv_heads, budget_tokens.shape[1] // kv_heads
    if tasks > _MOST_TASKS:
        raise UnsupportedImplementationError(
            f"expected at most {_MOST_TASKS} tasks, got {tasks}; divide with XLA"
        )
    silence_triton_deprecation()
    of_tasks = jax.ShapeDtypeStruct((tasks,), jnp.int32)
    known, status, k_units, ranked_units, boundary = pl.pallas_call(
        functools.partial(
            _kernel,
            kv_heads=kv_heads,
            granularities=granularities,
            unknown_status=unknown_status,
            sides=sides,
            block_bytes=block_bytes,
            scanned_bytes=scanned_bytes,
            least=least,
        ),
        out_shape=[
            of_tasks,
            of_tasks,
            jax.ShapeDtypeStruct((tasks, group), jnp.int32),
            of_tasks,
            of_tasks,
        ],
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="divide_work",
    )(
        granularity.astype(jnp.int32).reshape(tasks),
        budget_tokens.astype(jnp.int32).reshape(tasks, group),
        shared.reshape(tasks),
        host_blocks,
        everything,
        share.reshape(1),
        ahead.reshape(1),
    )
    by_task = (batch, kv_heads)
    return Division(
        known.reshape(by_task),
        status.reshape(by_task),
        k_units.reshape(budget_tokens.shape),
        ranked_units.reshape(by_task),
        boundary.reshape(by_task),
    )


def _kernel(
    granularity_ref: Any,
    budget_ref: Any,
    shared_ref: Any,
    host_blocks_ref: Any,
    everything_ref: Any,
    share_ref: Any,
    ahead_ref: Any,
    known_ref: Any,
    status_ref: Any,
    k_units_ref: Any,
    ranked_units_ref: Any,
    boundary_ref: Any,
    *,
    kv_heads: int,
    granularities: tuple[int, ...],
    unknown_status: int,
    sides: str,
    block_bytes: int,
    scanned_bytes: int,
    least: float,
) -> None:
    tasks, group = budget_ref.shape
    task = jnp.arange(pl.next_power_of_2(tasks), dtype=jnp.int32)
    exists = task < tasks
    row = task // kv_heads

    def load(ref: Any, *index: jax.Array) -> jax.Array:
        return pltriton.load(ref.at[index], mask=exists, other=0)

    def store(ref: Any, x: jax.Array, *index: jax.Array) -> None:
        pltriton.store(ref.at[index], x, mask=exists)

    asked = load(granularity_ref, task)
    known = functools.reduce(jnp.logical_or, [asked == tokens for tokens in granularities])
    granularity = jnp.where(known, asked, granularities[0])
    # Powers of two: divisions by numbers that vary would take most of the kernel's time.
    shift = functools.reduce(
        jnp.add, [jnp.where(granularity >= tokens, 1, 0) for tokens in granularities[1:]]
    )
    token_shift = shift + (granularities[0].bit_length() - 1)
    held, everything = load(host_blocks_ref, row), load(everything_ref, row) != 0
    units = (held + (1 << shift) - 1) >> shift
    most, fewest, total = jnp.zeros_like(units), units, jnp.zeros_like(units)
    for g in range(group):
        head = jnp.full_like(task, g)
        budget = jnp.maximum(load(budget_ref, task, head), 0)
        # Not by adding to the budget, which may be the largest number there is.
        wanted = (budget >> token_shift) + jnp.where((budget & (granularity - 1)) > 0, 1, 0)
        selected = jnp.where(everything, units, jnp.minimum(wanted, units))
        store(k_units_ref, selected, task, head)
        most, fewest = jnp.maximum(most, selected), jnp.minimum(fewest, selected)
        total += selected
    store(known_ref, granularity, task)
    store(status_ref, jnp.where(known, 0, unknown_status), task)
    ranked = jnp.where((most > 0) & (fewest < units), units, 0)
    store(ranked_units_ref, ranked, task)
    if sides != "both":
        store(boundary_ref, held if sides == "host" else jnp.zeros_like(held), task)
        return
    upper_bound = jnp.where(load(shared_ref, task) != 0, most, total) << shift
    size = jnp.minimum(upper_bound, held).astype(jnp.float32) * block_bytes
    size += (ranked * scanned_bytes).astype(jnp.float32)
    store(boundary_ref, _cut(size, held, share_ref[0], ahead_ref[0], least), task)


def _cut(
    size: jax.Array, blocks: jax.Array, share: jax.Array, ahead: jax.Array, least: float
) -> jax.Array:
    """Gives the host `(total + ahead) * share` of the sizes, at least nothing and at most all.

    Tasks are taken by size, equal ones by index; at most one is cut. Every task is compared with
    every other at once, in registers.

    Args:
      size: float32 `[T]`, not negative; tasks of size 0 may be added.
      blocks: int32 `[T]`, into which each task can be cut.
      share: float32 scalar, 0 to 1.
      ahead: float32 scalar, by how much the host begins earlier, in units of `size`.
      least: a smaller part than this of a task goes with the rest of it.

    Returns:
      int32 `[T]`: blocks below this one are the host's. A task of size 0 is the host's if the host
      has everything, else the device's.
    """
    task = jnp.arange(size.size, dtype=jnp.int32)
    total = jnp.sum(size)
    host = jnp.minimum(jnp.maximum((total + ahead) * share, 0.0), total)
    shape = (task.size, task.size)
    mine, others = (jnp.broadcast_to(size[:, None], shape), jnp.broadcast_to(size[None, :], shape))
    tie = jnp.broadcast_to(task[None, :], shape) < jnp.broadcast_to(task[:, None], shape)
    earlier = (others > mine) | ((others == mine) & tie)
    before = jnp.sum(jnp.where(earlier, others, 0.0), axis=1)
    part = jnp.minimum(jnp.maximum(host - before, 0.0), size)
    too_little = (part < least) | (size - part < least)
    part = jnp.where(too_little, jnp.where(2.0 * part >= size, size, 0.0), part)
    # A task without work goes where everything goes before it is split.
    nothing = jnp.where(jnp.broadcast_to(host >= total, size.shape), 1.0, 0.0)
    of_host = jnp.where(size > 0.0, part / jnp.maximum(size, 1.0), nothing)
    # Halves go to the even number, as everywhere.
    exact = of_host * blocks.astype(jnp.float32)
    below = jnp.floor(exact)
    rest, floor = exact - below, below.astype(jnp.int32)
    up = (rest > 0.5) | ((rest == 0.5) & ((floor & 1) == 1))
    return jnp.where(of_host >= 1.0, blocks, floor + jnp.where(up, 1, 0))
