"""Even shares of the selected blocks for the programs of a GPU kernel.

A program takes a range of the blocks of one task, in ascending order. All ranges but the last of a
task have the same length, whatever the tasks, so that a single long one fills the chip.

Axes: T tasks (one KV head of one sequence).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Shares(NamedTuple):
    """Which programs take which blocks of a task.

    Attributes:
      blocks: int32 `[]`, blocks of a program, a multiple of the tile.
      programs: int32 `[T]`, programs of a task.
      end: int32 `[T]`, one past the last program of a task; the first of all is 0.
    """

    blocks: jax.Array
    programs: jax.Array
    end: jax.Array


def shares(total: jax.Array, programs: int, tile_blocks: int) -> Shares:
    """Cuts the tasks' blocks into even shares; usable within kernels.

    Args:
      total: int32 `[T]`, selected blocks of a task.
      programs: how many there should be; rounding up can add one for each task.
      tile_blocks: blocks that a program loads at a time.
    """
    tiles = (jnp.sum(total) + programs * tile_blocks - 1) // (programs * tile_blocks)
    blocks = jnp.maximum(tiles, 1) * tile_blocks
    of_task = (total + blocks - 1) // blocks
    return Shares(blocks, of_task, jnp.cumsum(of_task))
