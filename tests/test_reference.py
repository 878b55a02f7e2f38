"""The oracles against answers by hand, and against each other."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxion_jax import reference
from fluxion_jax.errors import ConfigError

BATCH, HEADS, KV_HEADS, HEAD_DIM, TOKENS = 2, 6, 3, 5, 37
LENGTHS = (37, 21)
RNG = np.random.default_rng(0)
Q = RNG.normal(size=(BATCH, HEADS, HEAD_DIM))
K, V = RNG.normal(size=(2, BATCH, KV_HEADS, TOKENS, HEAD_DIM))


def everything(granularity: int) -> list[list[list[int]]]:
    return [[list(range(-(-length // granularity)))] * HEADS for length in LENGTHS]


def test_full_attention_by_hand():
    q = [[[2.0, 0.0]]]
    k = [[[[0.0, 9.0], [np.log(3.0), 0.0], [50.0, 0.0]]]]
    v = [[[[4.0, 0.0], [0.0, 8.0], [99.0, 99.0]]]]
    out, lse = reference.full_attention(q, k, v, [2], scale=0.5)
    np.testing.assert_allclose(out, [[[1.0, 6.0]]])
    np.testing.assert_allclose(lse, [[np.log(4.0)]])


def test_full_attention_is_that_of_jax():
    want = jax.nn.dot_product_attention(
        Q[:, None].astype(np.float32),
        K.swapaxes(1, 2).astype(np.float32),
        V.swapaxes(1, 2).astype(np.float32),
        scale=0.7,
        key_value_seq_lengths=np.array(LENGTHS, np.int32),
    )
    out, _ = reference.full_attention(Q, K, V, LENGTHS, scale=0.7)
    np.testing.assert_allclose(out, want[:, 0], 1e-5, 1e-6)


def test_an_empty_sequence_is_an_empty_state():
    out, lse = reference.full_attention(Q, K, V, (0, 3), scale=1.0)
    assert np.isneginf(lse[0]).all()
    assert not out[0].any()
    assert np.isfinite(lse[1]).all()


@pytest.mark.parametrize("granularity", [1, 4, 16, 64])
def test_all_units_are_full_attention(granularity):
    got = reference.block_sparse_attention(
        Q, K, V, LENGTHS, everything(granularity), granularity=granularity, scale=1.3
    )
    want = reference.full_attention(Q, K, V, LENGTHS, scale=1.3)
    np.testing.assert_allclose(got[0], want[0], 1e-12)
    np.testing.assert_allclose(got[1], want[1], 1e-12)


@given(head=st.integers(0, HEADS - 1), units=st.sets(st.integers(0, 4)))
def test_a_head_sees_only_its_own_units(head, units):
    """Whatever the keys outside of a head's own units become, its state stays the same."""
    chosen = [[[0, 3]] * HEADS for _ in range(BATCH)]
    chosen[1] = [[2]] * HEADS
    chosen[1][head] = sorted(units)
    mine = np.zeros(TOKENS, bool)
    for unit in units:
        mine[unit * 5 : min((unit + 1) * 5, LENGTHS[1])] = True
    spoiled_k, spoiled_v = K.copy(), V.copy()
    spoiled_k[1, head // 2, ~mine] = np.nan
    spoiled_v[1, head // 2, ~mine] = np.inf
    clean, spoiled = (
        reference.block_sparse_attention(Q, k, v, LENGTHS, chosen, granularity=5, scale=1.0)
        for k, v in ((K, V), (spoiled_k, spoiled_v))
    )
    np.testing.assert_array_equal(clean[0][1, head], spoiled[0][1, head])
    np.testing.assert_array_equal(clean[1][1, head], spoiled[1][1, head])


@given(
    owners=st.lists(st.integers(0, 3), min_size=8, max_size=8), granularity=st.sampled_from([5, 8])
)
def test_a_partition_of_the_units_merges_to_full_attention(owners, granularity):
    def part_of(part: int) -> list[list[list[int]]]:
        return [
            [[unit for unit in head if owners[unit] == part] for head in row]
            for row in everything(granularity)
        ]

    states = [
        reference.block_sparse_attention(
            Q, K, V, LENGTHS, part_of(part), granularity=granularity, scale=1.0
        )
        for part in range(4)
    ]
    got = reference.merge(states)
    want = reference.full_attention(Q, K, V, LENGTHS, scale=1.0)
    np.testing.assert_allclose(got[0], want[0], 1e-12)
    np.testing.assert_allclose(got[1], want[1], 1e-12)


def test_a_unit_beyond_the_end_is_refused():
    units = [[[7]] * HEADS, [[5]] * HEADS]
    with pytest.raises(ConfigError, match=r"sequence 1 within its 21 tokens, got \[5\] of 5"):
        reference.block_sparse_attention(Q, K, V, LENGTHS, units, granularity=5, scale=1.0)
    units = [[[-1]] * HEADS, [[0]] * HEADS]
    with pytest.raises(ConfigError, match=r"sequence 0 within its 37 tokens"):
        reference.block_sparse_attention(Q, K, V, LENGTHS, units, granularity=5, scale=1.0)


def test_unit_mass_by_hand():
    k = np.log([[1.0], [2.0], [3.0], [4.0], [10.0]])
    mass = reference.unit_mass([3.0], k, 2, scale=1 / 3)
    np.testing.assert_allclose(mass, [3 / 20, 7 / 20, 10 / 20])
    assert reference.unit_mass([3.0], k[:0], 2, scale=1.0).shape == (0,)


@given(wanted=st.integers(0, 6), per_group=st.booleans())
def test_no_other_selection_of_its_size_holds_more_mass(wanted, per_group):
    k_units = np.full((BATCH, HEADS), wanted)
    units = reference.oracle_selection(
        Q, K, LENGTHS, k_units, granularity=8, scale=2.0, per_group=per_group
    )
    for b, n in np.ndindex(BATCH, HEADS):
        mass = reference.unit_mass(Q[b, n], K[b, n // 2, : LENGTHS[b]], 8, 2.0)
        assert len(units[b][n]) == min(wanted, len(mass))
        if not per_group:
            best = np.sort(mass)[len(mass) - len(units[b][n]) :].sum()
            np.testing.assert_allclose(mass[units[b][n]].sum(), best)
        else:
            assert units[b][n] == units[b][n - n % 2]


def test_equal_units_are_taken_from_the_front():
    units = reference.oracle_selection(
        np.zeros_like(Q), K, LENGTHS, np.full((BATCH, HEADS), 2), granularity=7, scale=1.0
    )
    # 21 tokens are three whole units of 7, and 37 are five and a partial one of less mass.
    assert units == [[[0, 1]] * HEADS] * BATCH


def test_a_group_takes_the_largest_budget_and_the_largest_share():
    q = np.array([[[1.0, 0.0], [0.0, 1.0]]])
    k = np.array([[[[5.0, 0.0], [0.0, 0.0], [0.0, 9.0]]]])
    units = reference.oracle_selection(
        q, k, [3], [[1, 2]], granularity=1, scale=1.0, per_group=True
    )
    assert units == [[[0, 2], [0, 2]]]
    units = reference.oracle_selection(q, k, [3], [[1, 2]], granularity=1, scale=1.0)
    assert units == [[[0], [0, 2]]]
