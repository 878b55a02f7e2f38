"""The algebra of attention states: any partition of the keys merges to the same attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxion_jax import reference
from fluxion_jax.errors import ConfigError
from fluxion_jax.state import AttentionState, merge

BATCH, HEADS, KV_HEADS, HEAD_DIM, TOKENS = 2, 6, 3, 5, 23
RNG = np.random.default_rng(0)
Q = RNG.normal(size=(BATCH, HEADS, HEAD_DIM))
K, V = RNG.normal(size=(2, BATCH, KV_HEADS, TOKENS, HEAD_DIM))
LENGTHS = (TOKENS, TOKENS)
PARTS = 4

# Compiled once: every example merges the same number of states.
MERGE = jax.jit(merge)


def state_of(tokens, sharpness=1.0) -> AttentionState:
    units = [[tokens] * HEADS] * BATCH
    out, lse = reference.block_sparse_attention(
        Q, K, V, LENGTHS, units, granularity=1, scale=sharpness
    )
    return AttentionState(jnp.float32(out), jnp.float32(lse))


def assert_close(got, want, tolerance=2e-6):
    np.testing.assert_allclose(got[0], want[0], tolerance, tolerance)
    np.testing.assert_allclose(got[1], want[1], tolerance, tolerance)


@given(
    owners=st.lists(st.integers(0, PARTS - 1), min_size=TOKENS, max_size=TOKENS),
    sharpness=st.sampled_from([0.0, 0.3, 1.0, 40.0]),
)
def test_any_partition_merges_to_full_attention(owners, sharpness):
    parts = [[t for t in range(TOKENS) if owners[t] == part] for part in range(PARTS)]
    states = [state_of(tokens, sharpness) for tokens in parts]
    want = reference.full_attention(Q, K, V, LENGTHS, scale=sharpness)
    assert_close(MERGE(*states), want)


@given(
    order=st.permutations(range(PARTS)),
    cut=st.integers(1, PARTS - 1),
    lse=st.lists(
        st.one_of(st.just(-np.inf), st.floats(-1e4, 1e4, width=32)),
        min_size=PARTS,
        max_size=PARTS,
    ),
)
def test_order_and_grouping_do_not_matter(order, cut, lse):
    out = np.random.default_rng(1).normal(size=(PARTS, HEAD_DIM)).astype(np.float32)
    out[np.isneginf(lse)] = 0
    states = [AttentionState(jnp.asarray(out[i]), jnp.float32(lse[i])) for i in range(PARTS)]
    want = MERGE(*states)
    # A weight is exp of a difference of float32 logarithms, so it is as exact as they are.
    largest = max((abs(x) for x in lse if x != -np.inf), default=0.0)
    tolerance = 2e-6 + 4 * largest * np.finfo(np.float32).eps
    assert_close(MERGE(*[states[i] for i in order]), want, tolerance)
    grouped = merge(
        merge(*[states[i] for i in order[:cut]]), merge(*[states[i] for i in order[cut:]])
    )
    assert_close(grouped, want, tolerance)
    assert_close(want, reference.merge(states), tolerance)


def test_the_empty_state_is_neutral_to_the_bit():
    state = state_of(range(7))
    empty = AttentionState.empty(state.out.shape)
    for merged in (merge(state), merge(state, empty), merge(empty, state, empty)):
        np.testing.assert_array_equal(merged.out, state.out)
        np.testing.assert_array_equal(merged.lse, state.lse)


def test_empty_states_merge_to_an_empty_state():
    merged = merge(*[AttentionState.empty((2, 3, 5))] * 3)
    assert (merged.out == 0).all()
    assert jnp.isneginf(merged.lse).all()


def test_the_logarithm_is_natural():
    two = AttentionState(jnp.ones((1, 4)), jnp.zeros(1))
    assert_close(merge(two, two), (jnp.ones((1, 4)), np.log([2.0])))


def test_a_nan_surfaces_and_stays_in_its_head():
    state = state_of(range(7))
    spoiled = AttentionState(state.out.at[0, 1, 2].set(jnp.nan), state.lse)
    merged = merge(spoiled, state_of(range(7, 23)))
    assert np.argwhere(np.isnan(merged.out)).tolist() == [[0, 1, 2]]
    spoiled = AttentionState(state.out, state.lse.at[1, 4].set(jnp.nan))
    merged = merge(state_of(range(7, 23)), spoiled)
    assert np.argwhere(np.isnan(merged.lse)).tolist() == [[1, 4]]
    assert np.isnan(merged.out[1, 4]).all()


def test_a_state_is_float32_whatever_was_merged():
    half = AttentionState(jnp.ones((2, 4), jnp.bfloat16), jnp.zeros(2))
    assert {x.dtype for x in merge(half, half)} == {jnp.dtype("float32")}


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="at least one attention state"):
        merge()
    first, second = AttentionState.empty((2, 3, 5)), AttentionState.empty((2, 4, 5))
    with pytest.raises(ConfigError, match=r"expected states with out \(2, 3, 5\).*got \(2, 4, 5\)"):
        merge(first, second)
    with pytest.raises(ConfigError, match=r"lse \(2, 3\).*got \(2, 3, 5\) and \(2, 3, 5\)"):
        merge((first.out, first.out))
