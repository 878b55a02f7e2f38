"""How far each task of a layer goes to the host, largest first until its share is spent, in one kernel.

XLA takes a kernel for each sum over the tasks, and one behind each of them.

Axes: T tasks, one for each sequence and KV head.
"""  # noqa: E501

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.compat import silence_triton_deprecation, target_platform
from pallas_kernels.registry import UnsupportedImplementationError, traced_once

_MOST_TASKS = 128
"""Every task is compared with every other at once, in registers."""


@functools.partial(traced_once, constants=["least", "interpret"])
def cut_tasks(
    size: jax.Array,
    blocks: jax.Array,
    share: jax.Array,
    ahead: jax.Array,
    *,
    least: float,
    interpret: bool = False,
) -> jax.Array:
    """Gives the host `(total + ahead) * share` of the sizes, at least nothing and at most all.

    Tasks are taken by size, equal ones by index; at most one is cut.

    Args:
      size: float32 `[T]`, not negative.
      blocks: int32 `[T]`, into which each task can be cut.
      share: float32 scalar, 0 to 1.
      ahead: float32 scalar, by how much the host begins earlier, in units of `size`.
      least: a smaller part than this of a task goes with the rest of it.
      interpret: run on any platform, slowly; for tests.

    Returns:
      int32 `[T]`: blocks below this one are the host's. A task of size 0 is the host's if the host
      has everything, else the device's.

    Raises:
      UnsupportedImplementationError: not on a GPU, or too many tasks.
    """
    if not interpret and target_platform() != "gpu":
        raise UnsupportedImplementationError(
            f"expected a CUDA device, got platform {target_platform()!r}; cut with XLA"
        )
    if size.size > _MOST_TASKS:
        raise UnsupportedImplementationError(
            f"expected at most {_MOST_TASKS} tasks, got {size.size}; cut with XLA"
        )
    silence_triton_deprecation()
    cut: jax.Array = pl.pallas_call(
        functools.partial(_kernel, least=least),
        out_shape=jax.ShapeDtypeStruct(size.shape, jnp.int32),
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="cut_tasks",
    )(size, blocks, share.reshape(1), ahead.reshape(1))
    return cut


def _kernel(
    size_ref: Any, blocks_ref: Any, share_ref: Any, ahead_ref: Any, cut_ref: Any, *, least: float
) -> None:
    tasks = size_ref.shape[0]
    task = jnp.arange(pl.next_power_of_2(tasks), dtype=jnp.int32)
    size = pltriton.load(size_ref.at[task], mask=task < tasks, other=0.0)
    blocks = pltriton.load(blocks_ref.at[task], mask=task < tasks, other=0)
    total = jnp.sum(size)
    host = jnp.minimum(jnp.maximum((total + ahead_ref[0]) * share_ref[0], 0.0), total)
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
    share = jnp.where(size > 0.0, part / jnp.maximum(size, 1.0), nothing)
    # Halves go to the even number, as everywhere.
    exact = share * blocks.astype(jnp.float32)
    below = jnp.floor(exact)
    rest, floor = exact - below, below.astype(jnp.int32)
    up = (rest > 0.5) | ((rest == 0.5) & ((floor & 1) == 1))
    cut = jnp.where(share >= 1.0, blocks, floor + jnp.where(up, 1, 0))
    pltriton.store(cut_ref.at[task], cut, mask=task < tasks)
