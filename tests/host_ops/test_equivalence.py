"""submit and collect: every implementation does what the NumPy reference does."""

from __future__ import annotations

import numpy as np
import pytest

from host_ops import STATUS_INVALID, numpy_reference
from tests.host_ops import cases
from tests.host_ops.cases import Shape, check, random_case, run

SHAPE = Shape()
EVERYTHING = 10_000


@pytest.mark.parametrize(
    "shape",
    [
        Shape(dtype="bfloat16", head_dim=64, group=1),
        Shape(dtype="bfloat16", head_dim=96, group=7, batch=1, num_blocks=72),
        Shape(dtype="bfloat16", head_dim=128, group=3, num_blocks=72),
        Shape(dtype="float16", head_dim=88, group=7, batch=1, num_blocks=72),
        Shape(dtype="float32", head_dim=256, group=8, batch=1, num_blocks=40),
        Shape(dtype="float32", head_dim=8, group=3, batch=1, kv_heads=2, num_blocks=1032),
    ],
    ids=str,
)
def test_shapes(implementation, shape):
    for seed in range(2):
        want = check(implementation, random_case(shape, seed))
        assert want.blocks_read.any()


@pytest.mark.parametrize("seed", range(4))
def test_random_cases(implementation, seed):
    check(implementation, random_case(SHAPE, seed))


@pytest.mark.parametrize("host_blocks", [(0, 1), (2, 0), (0, 0), (136, 135), (33, 64)])
def test_ragged_lengths(implementation, host_blocks):
    case = random_case(SHAPE).with_work(host_blocks=host_blocks, boundary=np.full((2, 3), 136))
    want = check(implementation, case)
    assert np.isneginf(want.lse[np.array(host_blocks) == 0]).all()


@pytest.mark.parametrize("boundary", [-5, 0, 1, 31, 32, 68, 136, 2**31 - 1])
def test_boundaries_of_the_split(implementation, boundary):
    case = random_case(SHAPE).with_work(boundary=np.full((2, 3), boundary))
    want = check(implementation, case.with_work(k_units=np.full((2, 12), EVERYTHING)))
    expected = np.clip(boundary, 0, case.work.host_blocks)[:, None]
    np.testing.assert_array_equal(want.blocks_read, np.broadcast_to(expected, (2, 3)))
    check(implementation, case)


@pytest.mark.parametrize("granularity", [16, 32, 64, 128])
def test_granularities_with_a_partial_last_unit(implementation, granularity):
    case = random_case(SHAPE).with_work(
        granularity=np.full((2, 3), granularity), boundary=np.full((2, 3), 136)
    )
    for host_blocks in [(135, 61), (1, 9), (128, 64)]:
        check(implementation, case.with_work(host_blocks=host_blocks))


@pytest.mark.parametrize("k_units", [-3, 0, 1, 2, EVERYTHING])
def test_budgets(implementation, k_units):
    case = random_case(SHAPE).with_work(
        k_units=np.full((2, 12), k_units), boundary=np.full((2, 3), 136)
    )
    want = check(implementation, case)
    assert (np.isneginf(want.lse) == (k_units <= 0)).all()


@pytest.mark.parametrize("shared", [0, 1])
def test_ranking_per_head_and_per_group(implementation, shared):
    case = random_case(SHAPE).with_work(
        shared=np.full((2, 3), shared), boundary=np.full((2, 3), 136)
    )
    want = check(implementation, case)
    groups = want.selection.reshape(2, 3, 4, -1)
    assert (groups == groups[:, :, :1]).all() == bool(shared)


def test_ties_go_to_the_lowest_unit(implementation):
    case = random_case(SHAPE).with_work(
        k_units=np.full((2, 12), 5),
        boundary=np.full((2, 3), 136),
        granularity=np.resize([16, 64], (2, 3)),
    )
    equal = case.with_work(q8=np.zeros_like(case.work.q8))
    want = check(implementation, equal)
    assert (want.selection[0, 0] == [0b11111, 0, 0, 0, 0]).all()
    assert (want.selection[0, 4] == [2**20 - 1, 0, 0, 0, 0]).all()
    # Few values, hence many ties above, at and below the threshold.
    q8 = np.zeros_like(case.work.q8)
    q8[..., 7] = 1
    few = case.with_work(q8=q8)
    few.summaries[...] = few.summaries // 64
    few.summaries[..., 1, :] = np.maximum(few.summaries[..., 1, :], few.summaries[..., 0, :])
    check(implementation, few)


def test_scores_at_the_limits_of_int8(implementation):
    case = random_case(SHAPE).with_work(boundary=np.full((2, 3), 136))
    case.work.q8[...] = np.where(case.work.q8 < 0, -127, 127)
    case.summaries[..., 0, :] = np.where(case.summaries[..., 0, :] < 0, -127, 126)
    case.summaries[..., 1, :] = 127
    check(implementation, case)
    case.work.q8[...] = 127
    case.summaries[...] = -127
    check(implementation, case)


def test_extreme_logits(implementation):
    case = random_case(SHAPE).with_work(
        boundary=np.full((2, 3), 136), k_units=np.full((2, 12), EVERYTHING)
    )
    case.k[:, :, 37, 5] *= 3e4
    check(implementation, case)
    case.k[:, :, 37, 5] = 0
    case.k[...] = case.k[:, :, :1, :1]
    check(implementation, case)
    case.k[...] = 0
    want = check(implementation, case)
    np.testing.assert_allclose(want.lse[0], np.log(16.0 * case.work.host_blocks[0]), 1e-6)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["k", "v"])
def test_what_is_not_finite_stays_with_the_heads_that_selected_it(implementation, name, poison):
    case = random_case(SHAPE)
    chosen = np.zeros((2, 12, 136), bool)
    chosen[:, :, 3:90] = True
    chosen[:, 1::4, 50] = False
    case = case.with_work(boundary=np.full((2, 3), 136), host_blocks=(136, 100))
    case = case.with_work(bitmap=numpy_reference.pack(chosen))
    getattr(case, name)[:, :, 50, 9, 11] = poison
    # A key of +inf against a negative query is a score of -inf, and that is a weight of 0.
    case.work.q[..., 11] = np.abs(case.work.q[..., 11])
    case.v[:, :, 91:] = np.nan
    case.k[:, :, :3] = np.nan
    got = run(implementation, case)
    poisoned = ~np.isfinite(got.out).all(axis=-1)
    np.testing.assert_array_equal(poisoned, np.broadcast_to(chosen[0, :, 50], (2, 12)))
    clean = cases.reference(case)
    np.testing.assert_allclose(
        got.out[:, 1::4], clean.out[:, 1::4], cases.TOLERANCE, cases.TOLERANCE
    )


def test_a_query_that_is_not_finite_spoils_only_its_head(implementation):
    case = random_case(SHAPE).with_work(
        boundary=np.full((2, 3), 136), k_units=np.full((2, 12), EVERYTHING)
    )
    case.work.q[0, 5, 3] = np.nan
    got = run(implementation, case)
    spoiled = np.isnan(got.out).all(axis=-1)
    assert spoiled[0, 5]
    assert spoiled.sum() == 1
    check(implementation, case)


@pytest.mark.parametrize("summaries", [True, False])
def test_given_selection(implementation, summaries):
    case = random_case(SHAPE, bitmap=True)
    case = case.with_work(granularity=np.zeros((2, 3)), boundary=[[136, 0, 50], [9, 200, -1]])
    if not summaries:
        case.summaries = None
    want = check(implementation, case)
    assert (want.units_scanned == 0).all()


def test_an_empty_selection_is_an_empty_state(implementation):
    case = random_case(SHAPE, bitmap=True).with_work(boundary=np.full((2, 3), 136))
    case.work.bitmap[:, 2::4] = 0
    want = check(implementation, case)
    assert np.isneginf(want.lse[:, 2::4]).all()
    assert (want.out[:, 2::4] == 0).all()


@pytest.mark.parametrize(
    "fields",
    [
        {"host_blocks": (137, 5)},
        {"host_blocks": (-1, 5)},
        {"granularity": np.full((2, 3), 48)},
        {"granularity": np.zeros((2, 3))},
    ],
    ids=str,
)
def test_invalid_work_is_refused_and_nothing_is_written(implementation, fields):
    case = random_case(SHAPE).with_work(boundary=np.full((2, 3), 136), **fields)
    case = case.with_flush(first_block=(100, 90), num_blocks=(2, 3))
    want = check(implementation, case)
    assert want.status == [STATUS_INVALID]


def test_equal_inputs_give_equal_bits(implementation):
    case = random_case(SHAPE).with_work(k_units=np.full((2, 12), EVERYTHING))
    first, second = run(implementation, case), run(implementation, case)
    np.testing.assert_array_equal(first.out.view(np.uint32), second.out.view(np.uint32))
    np.testing.assert_array_equal(first.lse.view(np.uint32), second.lse.view(np.uint32))


@pytest.mark.parametrize("bitmap", [False, True])
def test_after_an_error_nothing_is_attended(implementation, bitmap):
    """The status of earlier layers is no error of this one."""
    case = random_case(SHAPE, bitmap=bitmap).with_work(boundary=np.full((2, 3), 136))
    assert np.isfinite(run(implementation, case.with_work(status=[0])).lse).any()
    found = run(implementation, case.with_work(status=[4]))
    assert found.status == 0
    assert np.isneginf(found.lse).all()
    assert not found.out.any()
    assert not found.blocks_read.any()
    assert not found.selection.any()
