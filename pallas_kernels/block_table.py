"""Tables of selected blocks: what the GPU kernels walk along instead of a bitmap.

Axes: B batch, N query heads, K KV heads, G = N // K, P blocks, W bitmap words. A task is one KV
head of one sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.bitmaps import group_union, popcount, rank, unpack

MAX_GROUP = 32
"""Query heads of a group: one bit each in a word of `BlockTable.heads`."""


class BlockTable(NamedTuple):
    """The blocks that each task reads, in ascending order, each once.

    Attributes:
      block: int32 `[B * K, P']`, block ids, 0 after the last; P' is P rounded up to whole tiles.
      heads: int32 `[B * K, P']`, bit `g` is set if head `g` of the group attends to the block; 0
        after the last.
      total: int32 `[B * K]`, blocks of the task.
    """

    block: jax.Array
    heads: jax.Array
    total: jax.Array


def block_table(
    bitmap: jax.Array, num_kv_heads: int, num_blocks: int, tile_blocks: int
) -> BlockTable:
    """Lists the selected blocks of every task.

    Args:
      bitmap: uint32 `[B, N, W]`.
      num_kv_heads: K; divides N, and N // K is at most `MAX_GROUP`.
      num_blocks: P.
      tile_blocks: blocks that a kernel takes at a time.

    Returns:
      The table.
    """
    batch, num_heads, _ = bitmap.shape
    tasks = batch * num_kv_heads
    group = num_heads // num_kv_heads
    capacity = -(-num_blocks // tile_blocks) * tile_blocks
    bits = unpack(bitmap, num_blocks).reshape(tasks, group, num_blocks)
    head_bit = jnp.uint32(1) << jnp.arange(group, dtype=jnp.uint32)
    heads = jnp.sum(jnp.where(bits, head_bit[:, None], jnp.uint32(0)), axis=1, dtype=jnp.uint32)
    heads = jax.lax.bitcast_convert_type(heads, jnp.int32)
    union = group_union(bitmap, num_kv_heads).reshape(tasks, -1)
    # What is not selected is sent past the end of the table, where the scatter drops it.
    place = jnp.where(heads != 0, rank(union, num_blocks), capacity)
    task = jnp.arange(tasks, dtype=jnp.int32)[:, None]
    block = jnp.broadcast_to(jnp.arange(num_blocks, dtype=jnp.int32), place.shape)
    entries = jnp.stack([block, heads], axis=-1)
    table = jnp.zeros((tasks, capacity, 2), jnp.int32)
    table = table.at[task, place].set(entries, mode="drop")
    return BlockTable(table[..., 0], table[..., 1], popcount(union))
