"""One loop over the tiles of many tasks of different sizes, so that no task pays for another."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

Carry = TypeVar("Carry")


def for_each_tile(
    counts: jax.Array,
    tile_size: int,
    body: Callable[[jax.Array, jax.Array, Carry], Carry],
    carry: Carry,
) -> Carry:
    """Runs `body(task, start, carry)` over all tiles of all tasks, task by task and in order.

    Args:
      counts: int32 `[tasks]`, elements of each task; a task of none costs nothing.
      tile_size: elements of a tile; a task's last tile may be partial.
      body: gets the task, the first element of the tile within its task, and the carry.
      carry: pytree of arrays.

    Returns:
      The last carry. The trip count is decided by the data.
    """
    ends = jnp.cumsum(-(-counts // tile_size), dtype=jnp.int32)

    def step(state: tuple[jax.Array, Carry]) -> tuple[jax.Array, Carry]:
        tile, carry = state
        task = jnp.sum(ends <= tile, dtype=jnp.int32)
        first = jnp.where(task > 0, ends[jnp.maximum(task - 1, 0)], 0)
        return tile + 1, body(task, (tile - first) * tile_size, carry)

    state = (jnp.zeros((), jnp.int32), carry)
    return jax.lax.while_loop(lambda state: state[0] < ends[-1], step, state)[1]


def keep_in_loop(x: jax.Array) -> jax.Array:
    """Returns `x`, hiding from the compiler that a loop passes it through unchanged.

    A loop-invariant array is taken out of the carry; whoever writes to it after the loop would
    then need a copy for the loop to read from, and conversions of it would be hoisted and done
    on the whole array.
    """
    return jax.lax.optimization_barrier(x)
