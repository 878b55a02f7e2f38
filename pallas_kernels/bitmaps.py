"""Bitmaps over base blocks: how a selection travels between devices.

Bit `i` of word `w` stands for block `32 * w + i`. Bits past the last block are always zero.
A bitmap has a fixed size, so it needs no capacity limit, whatever is selected.

Axes: B batch, N query heads, K KV heads, G = N // K, P blocks, W = ceil(P / 32) words.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

WORD_BITS = 32


def num_words(num_blocks: int) -> int:
    """Returns W, the words that `num_blocks` blocks take."""
    return -(-num_blocks // WORD_BITS)


def pack(bits: jax.Array) -> jax.Array:
    """Packs booleans into words.

    Args:
      bits: bool `[..., P]`.

    Returns:
      uint32 `[..., W]`.
    """
    num_blocks = bits.shape[-1]
    padding = num_words(num_blocks) * WORD_BITS - num_blocks
    padded = jnp.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, padding)])
    words = padded.reshape(*bits.shape[:-1], -1, WORD_BITS)
    weights = jnp.uint32(1) << jnp.arange(WORD_BITS, dtype=jnp.uint32)
    return jnp.sum(jnp.where(words, weights, jnp.uint32(0)), axis=-1, dtype=jnp.uint32)


def unpack(bitmap: jax.Array, num_blocks: int) -> jax.Array:
    """Unpacks words into booleans; the inverse of `pack`.

    Args:
      bitmap: uint32 `[..., W]`.
      num_blocks: P; at most `32 * W`.

    Returns:
      bool `[..., P]`.

    Raises:
      ValueError: if the bitmap has another number of words than P blocks take.
    """
    if bitmap.shape[-1] != num_words(num_blocks):
        raise ValueError(
            f"expected a bitmap of {num_words(num_blocks)} words for {num_blocks} blocks, got "
            f"{bitmap.shape[-1]} words; pass the number of blocks that the bitmap was built for"
        )
    shifts = jnp.arange(WORD_BITS, dtype=jnp.uint32)
    bits = (bitmap[..., None] >> shifts) & jnp.uint32(1)
    return bits.reshape(*bitmap.shape[:-1], -1)[..., :num_blocks].astype(jnp.bool_)


def popcount(bitmap: jax.Array) -> jax.Array:
    """Counts the blocks of a bitmap.

    Args:
      bitmap: uint32 `[..., W]`.

    Returns:
      int32 `[...]`.
    """
    return jnp.sum(jax.lax.population_count(bitmap).astype(jnp.int32), axis=-1)


def group_union(bitmap: jax.Array, num_kv_heads: int) -> jax.Array:
    """Returns which blocks a KV head has to read: the union over its query heads.

    Args:
      bitmap: uint32 `[B, N, W]`.
      num_kv_heads: K; divides N.

    Returns:
      uint32 `[B, K, W]`.
    """
    batch, num_heads, words = bitmap.shape
    grouped = bitmap.reshape(batch, num_kv_heads, num_heads // num_kv_heads, words)
    return fold_last(jax.lax.bitwise_or, jnp.moveaxis(grouped, 2, -1))


def fold_last(op: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Combines the entries of a short last axis, such as that of a group's heads.

    On a GPU a reduction is a kernel of its own, while elementwise operations go into those of
    others; so short ones are written out.

    Args:
      op: associative and elementwise.
      x: `[..., X]`, X at least 1.

    Returns:
      `[...]`.
    """
    return functools.reduce(op, [x[..., i] for i in range(x.shape[-1])])


def at_or_above(bitmap: jax.Array, boundary: jax.Array) -> jax.Array:
    """Keeps the blocks with an id at or above the boundary: the device's share.

    Args:
      bitmap: uint32 `[B, N, W]`.
      boundary: int32 `[B, K]`; K divides N.

    Returns:
      uint32 `[B, N, W]`.
    """
    words = bitmap.shape[-1]
    first_block = jnp.arange(words, dtype=jnp.int32) * WORD_BITS
    count = jnp.clip(boundary[..., None] - first_block, 0, WORD_BITS)
    # A shift by the full word width is undefined, hence the separate case.
    end = jnp.uint32(1) << jnp.minimum(count, WORD_BITS - 1).astype(jnp.uint32)
    below = jnp.where(count == WORD_BITS, jnp.uint32(0xFFFFFFFF), end - jnp.uint32(1))
    return bitmap & ~jnp.repeat(below, bitmap.shape[1] // boundary.shape[1], axis=1)


def nth_block(bitmap: jax.Array, n: jax.Array) -> jax.Array:
    """Finds the n-th selected block, counted from 0 in ascending order.

    It neither sorts nor scatters, so a caller can ask for a few blocks at a time and pay for those.

    Args:
      bitmap: uint32 `[..., W]`.
      n: int32 `[..., M]`.

    Returns:
      int32 `[..., M]`, block ids; meaningless (but never negative) where `n` is not below the
      number of selected blocks.
    """
    per_word = jax.lax.population_count(bitmap).astype(jnp.int32)
    end = jnp.cumsum(per_word, axis=-1)
    passed = end[..., None, :] <= n[..., :, None]
    word_index = jnp.minimum(jnp.sum(passed, axis=-1, dtype=jnp.int32), bitmap.shape[-1] - 1)
    rank = n - jnp.sum(jnp.where(passed, per_word[..., None, :], 0), axis=-1)
    word = jnp.take_along_axis(bitmap, word_index, axis=-1)
    position = jnp.zeros_like(n)
    for step in (16, 8, 4, 2, 1):
        low = word & jnp.uint32((1 << step) - 1)
        in_low = jax.lax.population_count(low).astype(jnp.int32)
        high = rank >= in_low
        rank = jnp.where(high, rank - in_low, rank)
        word = jnp.where(high, word >> jnp.uint32(step), word)
        position = jnp.where(high, position + step, position)
    return word_index * WORD_BITS + position


def rank(bitmap: jax.Array, num_blocks: int) -> jax.Array:
    """Counts, for every block, the selected blocks before it.

    The running sum goes over words instead of blocks, which makes it 32 times shorter.

    Args:
      bitmap: uint32 `[..., W]`.
      num_blocks: P.

    Returns:
      int32 `[..., P]`.
    """
    per_word = jax.lax.population_count(bitmap).astype(jnp.int32)
    before_word = jnp.cumsum(per_word, axis=-1) - per_word
    lower_bits = (jnp.uint32(1) << jnp.arange(WORD_BITS, dtype=jnp.uint32)) - jnp.uint32(1)
    in_word = jax.lax.population_count(bitmap[..., None] & lower_bits).astype(jnp.int32)
    ranks = before_word[..., None] + in_word
    return ranks.reshape(*bitmap.shape[:-1], -1)[..., :num_blocks]


def has_block(bitmap: jax.Array, block: jax.Array) -> jax.Array:
    """Tells whether given blocks are selected.

    Args:
      bitmap: uint32 `[..., W]`.
      block: int32 `[..., M]`, block ids.

    Returns:
      bool `[..., M]`.
    """
    word = jnp.take_along_axis(bitmap, block // WORD_BITS, axis=-1)
    return ((word >> (block % WORD_BITS).astype(jnp.uint32)) & jnp.uint32(1)).astype(jnp.bool_)
