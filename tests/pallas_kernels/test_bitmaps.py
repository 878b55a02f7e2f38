"""Bitmaps: every helper against plain loops over bits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import bitmaps
from tests.pallas_kernels import oracle

NTH_BLOCK = jax.jit(bitmaps.nth_block)
RANK = jax.jit(bitmaps.rank, static_argnums=1)
SIZES = [1, 24, 31, 32, 33, 64, 71]


def random_bits(num_blocks, shape=(2, 6)):
    return np.random.default_rng(num_blocks).random((*shape, num_blocks)) < 0.4


@pytest.mark.parametrize("num_blocks", SIZES)
def test_pack_and_unpack(num_blocks):
    bits = random_bits(num_blocks)
    packed = bitmaps.pack(jnp.asarray(bits))
    assert packed.dtype == jnp.uint32
    np.testing.assert_array_equal(packed, oracle.pack(bits))
    np.testing.assert_array_equal(bitmaps.unpack(packed, num_blocks), bits)


def test_the_highest_bit_of_a_word():
    bits = np.zeros(33, bool)
    bits[31] = True
    np.testing.assert_array_equal(bitmaps.pack(jnp.asarray(bits)), np.uint32([1 << 31, 0]))


def test_unpack_refuses_another_size():
    with pytest.raises(ValueError, match="expected a bitmap of 2 words for 33 blocks, got 1 words"):
        bitmaps.unpack(jnp.zeros((1,), jnp.uint32), 33)


@pytest.mark.parametrize("num_blocks", SIZES)
def test_popcount_and_union(num_blocks):
    bits = random_bits(num_blocks)
    packed = bitmaps.pack(jnp.asarray(bits))
    np.testing.assert_array_equal(bitmaps.popcount(packed), bits.sum(axis=-1))
    union = bitmaps.group_union(packed, 2)
    np.testing.assert_array_equal(union, oracle.pack(bits.reshape(2, 2, 3, -1).any(axis=2)))


@pytest.mark.parametrize("boundary", [-3, 0, 1, 31, 32, 33, 63, 64, 70, 71, 1000])
def test_the_devices_share_begins_at_the_boundary(boundary):
    bits = random_bits(71)
    packed = bitmaps.pack(jnp.asarray(bits))
    # Only the first KV head of the first row is tried; its neighbours stay wholly on one side.
    boundaries = np.array([[boundary, 0], [1000, 7]], np.int32)
    keep = np.arange(71) < np.repeat(boundaries, 3, axis=1)[..., None]
    np.testing.assert_array_equal(
        bitmaps.at_or_above(packed, jnp.asarray(boundaries)), oracle.pack(bits & ~keep)
    )


@pytest.mark.parametrize("num_blocks", SIZES)
def test_nth_block_lists_the_selection_in_order(num_blocks):
    bits = random_bits(num_blocks)
    bits[0, 0] = False
    bits[1, 1] = True
    packed = bitmaps.pack(jnp.asarray(bits))
    ranks = np.broadcast_to(np.arange(num_blocks, dtype=np.int32), bits.shape)
    got = np.asarray(NTH_BLOCK(packed, jnp.asarray(ranks)))
    assert got.min() >= 0
    for index in np.ndindex(bits.shape[:-1]):
        expected = np.flatnonzero(bits[index])
        np.testing.assert_array_equal(got[index][: len(expected)], expected)


@pytest.mark.parametrize("num_blocks", SIZES)
def test_rank_counts_the_blocks_before(num_blocks):
    bits = random_bits(num_blocks)
    before = np.cumsum(bits, axis=-1) - bits
    np.testing.assert_array_equal(RANK(bitmaps.pack(jnp.asarray(bits)), num_blocks), before)


def test_has_block():
    bits = random_bits(71)
    blocks = np.random.default_rng(1).integers(0, 71, size=(2, 6, 13)).astype(np.int32)
    got = bitmaps.has_block(bitmaps.pack(jnp.asarray(bits)), jnp.asarray(blocks))
    np.testing.assert_array_equal(got, np.take_along_axis(bits, blocks, axis=-1))
