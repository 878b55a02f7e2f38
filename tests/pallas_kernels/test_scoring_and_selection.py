"""Scoring and selection of units: exact integers, compared for equality."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import UnsupportedImplementationError, num_units, score_units, select_units
from pallas_kernels.selection_triton import MAX_BLOCKS, select_units_triton
from tests.pallas_kernels import lowering, oracle

SCORE = jax.jit(score_units)


interpreted = jax.jit(functools.partial(select_units_triton, interpret=True))
# What this machine takes by default (on a GPU the kernel), and the kernel interpreted.
SELECT = [jax.jit(select_units), interpreted]
LOWEST = np.iinfo(np.int32).min
ALL_GRANULARITIES = np.array([[16, 32], [64, 128], [32, 16]], np.int32)


def check_scores(q8, summaries, granularity, host_blocks):
    got = SCORE(*map(jnp.asarray, (q8, summaries, granularity, host_blocks)))
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, oracle.score_units(q8, summaries, granularity, host_blocks))


@pytest.mark.parametrize(
    ("group", "num_blocks", "head_dim"), [(1, 8, 64), (3, 24, 128), (7, 40, 256)]
)
def test_scores_are_exact(group, num_blocks, head_dim):
    rng = np.random.default_rng(num_blocks)
    rows = num_blocks * 15 // 8
    summaries = rng.integers(-127, 128, size=(3, 2, rows, 2, head_dim)).astype(np.int8)
    summaries.sort(axis=3)
    q8 = rng.integers(-127, 128, size=(3, 2 * group, head_dim)).astype(np.int8)
    host_blocks = np.array([num_blocks, num_blocks - 3, 0], np.int32)
    check_scores(q8, summaries, ALL_GRANULARITIES, host_blocks)


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_scores_are_exact(sign):
    q8 = np.full((1, 2, 256), 127 * sign, np.int8)
    q8[0, 1, ::2] *= -1
    summaries = np.full((1, 1, 15, 2, 256), 127, np.int8)
    summaries[..., 0, :] = -127
    summaries[0, 0, 3] = 127 * sign
    check_scores(q8, summaries, np.array([[16]], np.int32), np.array([8], np.int32))


def test_the_score_bounds_every_key_of_the_unit():
    rng = np.random.default_rng(3)
    keys = rng.integers(-127, 128, size=(8, 16, 64))
    lo, hi = keys.min(axis=1), keys.max(axis=1)
    summaries = np.zeros((1, 1, 15, 2, 64), np.int8)
    summaries[0, 0, :8, 0], summaries[0, 0, :8, 1] = lo, hi
    q8 = rng.integers(-127, 128, size=(1, 1, 64)).astype(np.int8)
    scores = SCORE(q8, summaries, jnp.array([[16]]), jnp.array([8]))
    assert np.all(np.asarray(scores)[0, 0] >= (keys @ q8[0, 0].astype(int)).max(axis=1))


def test_num_units_counts_a_partial_unit():
    got = num_units(jnp.array([[16, 32, 64, 128]] * 4), jnp.array([0, 1, 8, 9]))
    np.testing.assert_array_equal(got, [[0, 0, 0, 0], [1, 1, 1, 1], [8, 4, 2, 1], [9, 5, 3, 2]])


def test_scoring_refuses_wrong_dtypes():
    with pytest.raises(ValueError, match=r"expected int8 q8.*got float32"):
        score_units(
            jnp.zeros((1, 2, 64)),
            jnp.zeros((1, 1, 15, 2, 64), jnp.int8),
            jnp.array([[16]]),
            jnp.array([8]),
        )


def check_selection(scores, granularity, host_blocks, k_units, shared):
    scores, granularity, host_blocks, k_units, shared = (
        np.asarray(x, np.int32) for x in (scores, granularity, host_blocks, k_units, shared)
    )
    want = oracle.select_units(scores, granularity, host_blocks, k_units, shared)
    for select in SELECT:
        got = select(*map(jnp.asarray, (scores, granularity, host_blocks, k_units, shared)))
        np.testing.assert_array_equal(got, oracle.pack(want))
    return want


@pytest.mark.parametrize("group", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("spread", [3, 2**20, 2**31 - 1])
def test_selection_is_exact(group, spread):
    # A spread of 3 makes nearly all scores ties.
    num_blocks = 40
    rng = np.random.default_rng(group)
    for host_blocks in ([40, 33, 32], [31, 1, 0]):
        scores = rng.integers(-spread, spread, size=(3, 2 * group, num_blocks), endpoint=True)
        k_units = rng.integers(0, 12, size=(3, 2 * group))
        check_selection(scores, ALL_GRANULARITIES, host_blocks, k_units, np.zeros((3, 2)))
        check_selection(scores, ALL_GRANULARITIES, host_blocks, k_units, [[1, 0], [1, 1], [0, 1]])


@pytest.mark.parametrize("wanted", [-5, 0, 1, 39, 40, 41, 2**31 - 1])
def test_wanted_units_are_clipped_to_what_exists(wanted):
    scores = np.random.default_rng(0).integers(-9, 9, size=(1, 3, 40))
    selected = check_selection(scores, [[16]], [40], np.full((1, 3), wanted), [[0]])
    np.testing.assert_array_equal(selected.sum(axis=-1), min(max(wanted, 0), 40))


def test_ties_go_to_the_lowest_unit():
    scores = np.zeros((1, 1, 40), np.int32)
    scores[0, 0, 35] = 1
    selected = check_selection(scores, [[16]], [40], [[4]], [[0]])
    np.testing.assert_array_equal(np.flatnonzero(selected), [0, 1, 2, 35])


def test_the_lowest_score_of_all_is_a_score():
    scores = np.full((1, 1, 40), LOWEST, np.int32)
    selected = check_selection(scores, [[16]], [34], [[33]], [[0]])
    np.testing.assert_array_equal(np.flatnonzero(selected), np.arange(33))


def test_scores_beyond_the_units_are_never_selected():
    scores = np.zeros((1, 1, 40), np.int32)
    scores[0, 0, 5:] = 2**31 - 1
    selected = check_selection(scores, [[16]], [5], [[7]], [[0]])
    np.testing.assert_array_equal(np.flatnonzero(selected), np.arange(5))


def test_a_partial_last_unit_ends_with_the_host_blocks():
    scores = np.zeros((1, 1, 40), np.int32)
    scores[0, 0, 2] = 1
    selected = check_selection(scores, [[128]], [19], [[1]], [[0]])
    np.testing.assert_array_equal(np.flatnonzero(selected), [16, 17, 18])


def test_a_shared_group_ranks_once_by_the_maximum():
    scores = np.zeros((1, 4, 8), np.int32)
    scores[0, 0, 6] = 5
    scores[0, 1, 2] = 9
    scores[0, 2:, 1] = 3
    selected = check_selection(scores, [[16, 16]], [8], [[1, 2, 1, 0]], [[1, 0]])
    assert [list(np.flatnonzero(row)) for row in selected[0]] == [[2, 6], [2, 6], [1], []]


def test_one_compilation_serves_every_budget_and_granularity():
    select = jax.jit(lambda *args: select_units(*args))
    for granularity, wanted in ((16, 0), (64, 3), (128, 50)):
        select(
            jnp.zeros((1, 2, 8), jnp.int32),
            jnp.full((1, 1), granularity),
            jnp.array([8]),
            jnp.full((1, 2), wanted),
            jnp.zeros((1, 1), jnp.int32),
        )
    assert select._cache_size() == 1


def test_selection_refuses_wrong_shapes():
    with pytest.raises(ValueError, match=r"expected int32 scores \[B, N, P\].*correct the shapes"):
        select_units(
            jnp.zeros((1, 3, 8), jnp.int32),
            jnp.full((1, 2), 16),
            jnp.array([8]),
            jnp.full((1, 3), 1),
            jnp.zeros((1, 2), jnp.int32),
        )


def shapes(num_blocks: int) -> list[jax.ShapeDtypeStruct]:
    sizes = [(2, 32, num_blocks), (2, 8), (2,), (2, 32), (2, 8)]
    return [jax.ShapeDtypeStruct(size, jnp.int32) for size in sizes]


def test_selection_is_one_kernel_on_a_gpu_unless_a_program_cannot_hold_the_scores():
    assert lowering.lower_for_cuda(select_units, *shapes(MAX_BLOCKS)).count("xla.gpu.triton") == 1
    assert "triton" not in lowering.lower_for_cuda(select_units, *shapes(MAX_BLOCKS + 8))


def test_the_kernel_is_refused_by_name_without_a_gpu():
    with (
        jax.default_device(jax.devices("cpu")[0]),
        pytest.raises(UnsupportedImplementationError, match="triton: expected a CUDA device"),
    ):
        select_units(*(jnp.zeros(x.shape, x.dtype) for x in shapes(8)), implementation="triton")
