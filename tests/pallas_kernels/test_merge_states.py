"""Merging of attention states: an exact partition gives the whole, and -inf is the identity."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import merge_states
from tests.pallas_kernels import oracle

RNG = np.random.default_rng(5)
TOKENS, HEAD_DIM = 53, 24


def state(q, k, v):
    out, lse = oracle.attend(q, k, v, 1.0)
    return jnp.asarray(out[None], jnp.float32), jnp.asarray([lse], jnp.float32)


@pytest.fixture
def parts():
    q = RNG.normal(size=HEAD_DIM)
    k, v = RNG.normal(size=(2, TOKENS, HEAD_DIM))
    cuts = [(0, 1), (1, 20), (20, 20), (20, TOKENS)]
    return state(q, k, v), [state(q, k[a:b], v[a:b]) for a, b in cuts]


def close(got, want, tolerance=2e-6):
    np.testing.assert_allclose(got[0], want[0], rtol=0, atol=tolerance)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-6, atol=tolerance)


def test_a_partition_gives_the_whole(parts):
    whole, pieces = parts
    close(merge_states(pieces), whole)
    close(merge_states(pieces[::-1]), whole)


def test_associative(parts):
    _, (a, b, c, d) = parts
    left = merge_states([merge_states([merge_states([a, b]), c]), d])
    close(left, merge_states([a, merge_states([b, merge_states([c, d])])]))


def test_the_empty_state_changes_no_bit(parts):
    whole, _ = parts
    empty = (jnp.zeros_like(whole[0]), jnp.full_like(whole[1], -jnp.inf))
    for states in ([whole, empty], [empty, whole]):
        out, lse = merge_states(states)
        np.testing.assert_array_equal(out, whole[0])
        np.testing.assert_array_equal(lse, whole[1])


def test_what_an_empty_state_holds_is_ignored(parts):
    whole, _ = parts
    garbage = (jnp.full_like(whole[0], jnp.nan), jnp.full_like(whole[1], -jnp.inf))
    np.testing.assert_array_equal(merge_states([garbage, whole])[0], whole[0])


def test_only_empty_states_stay_empty():
    empty = (jnp.zeros((2, 3, 8)), jnp.full((2, 3), -jnp.inf))
    out, lse = merge_states([empty, empty, empty])
    assert np.all(np.asarray(out) == 0.0)
    assert np.all(np.asarray(lse) == -np.inf)


@pytest.mark.parametrize("gap", [-100.0, 100.0, 1e4])
def test_states_far_apart(gap):
    a = (jnp.full((1, 4), 2.0), jnp.asarray([3.0]))
    b = (jnp.full((1, 4), 5.0), jnp.asarray([3.0 + gap]))
    out, lse = merge_states([a, b])
    np.testing.assert_allclose(out, np.full((1, 4), 5.0 if gap > 0 else 2.0), rtol=1e-6)
    np.testing.assert_allclose(lse, [max(3.0, 3.0 + gap)], rtol=1e-6)


@pytest.mark.parametrize("where", ["out", "lse"])
def test_nan_surfaces(where):
    good = (jnp.ones((1, 4)), jnp.asarray([3.0]))
    bad = (jnp.full((1, 4), jnp.nan), jnp.asarray([1.0]))
    bad = bad if where == "out" else (jnp.ones((1, 4)), jnp.asarray([jnp.nan]))
    assert np.isnan(merge_states([good, bad])[0]).all()


def test_weights_follow_the_number_of_equal_keys():
    a = (jnp.full((1, 2), 1.0), jnp.asarray([np.log(1.0)], jnp.float32))
    b = (jnp.full((1, 2), 4.0), jnp.asarray([np.log(2.0)], jnp.float32))
    out, lse = merge_states([a, b])
    np.testing.assert_allclose(out, np.full((1, 2), 3.0), rtol=1e-6)
    np.testing.assert_allclose(lse, np.log([3.0]), rtol=1e-6)


def test_nothing_to_merge_is_refused():
    with pytest.raises(ValueError, match="expected at least one attention state, got none"):
        merge_states([])
