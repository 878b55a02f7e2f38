from __future__ import annotations

import numpy as np
import pytest

import fluxion_jax as fx
from fluxion_jax.calibration.rating import Judge, Predictions
from fluxion_jax.calibration.samples import HeadSamples
from fluxion_jax.policy.features import NUM_FEATURES

HOST = 1024
ERRORS = (0.1, 0.2, 0.5)
LAYOUT = fx.KVLayout(2, 2, 64, "float32", num_heads=4, sketch=True)
SIZES = np.asarray([16, 32, 64, 128])


def needs(budgets: np.ndarray, window_error: np.ndarray) -> HeadSamples:
    """Of budgets `[S, L, N, E, D]`."""
    steps = len(budgets)
    return HeadSamples(
        np.zeros((*budgets.shape[:3], NUM_FEATURES), np.float32),
        np.moveaxis(budgets, (3, 4), (1, 2)).astype(np.int32),
        window_error.astype(np.float32),
        np.full(steps, HOST, np.int32),
        np.arange(steps, dtype=np.int32),
        (0, 1),
        ERRORS,
        LAYOUT,
    )


def one_step() -> HeadSamples:
    """The first head of the first layer needs 64 tokens, or 16 for a looser tolerance."""
    budgets = np.zeros((2, 2, 4, 3, 4))
    budgets[0, 0, 0, 0] = [64, 64, 64, 128]
    budgets[0, 0, 0, 1] = [16, 32, 64, 128]
    error = np.full((2, 2, 4), 0.05)
    error[0, 0, 0] = 0.4
    return needs(budgets, error)


def given(tokens: float, *, heads: int = 1) -> Predictions:
    """The first heads of the first layer get so many tokens at any granularity."""
    logit = np.ones((2, 2, 4))
    logit[:, 0, :heads] = -1
    return Predictions(logit, np.full((2, 2, 4, 4), np.log2(tokens / HOST)))


def test_a_rating_says_what_falls_short_and_what_error_is_left():
    judge = Judge(one_step(), 0)
    enough = judge.rate(given(64), 0.0, 0.0)
    assert (enough.under_budget, enough.missed, enough.error_left) == (0, 0, 0)
    # The second step reads for nothing.
    assert enough.accuracy == 15 / 16
    # K/V of 16 tokens cost 32 channels' bytes in float32, and two summaries of int8 a unit.
    token, unit = 2 * 64 * 4, 2 * 64
    cheapest = min(max(64, s) * token + HOST // s * unit for s in SIZES)
    assert enough.given_fraction == pytest.approx(2 * cheapest / (2 * 2 * 2 * HOST * token))
    assert enough.needed_fraction == pytest.approx(cheapest / (2 * 2 * 2 * HOST * token))
    assert enough.over_provisioning == pytest.approx(2)


@pytest.mark.parametrize(("index", "left"), [(0, 0.3), (1, 0.2), (2, 0.0)])
def test_what_streams_wrongly_leaves_the_windows_error(index, left):
    rating = Judge(one_step(), index).rate(given(64, heads=0), 0.0, 0.0)
    assert rating.error_left == pytest.approx(left / 2)
    assert rating.under_budget == pytest.approx(1 / 16 if left else 0)
    assert rating.missed == pytest.approx(1 if left else 0)


def test_a_budget_that_is_too_small_leaves_the_error_of_the_next_smaller_one():
    # All granularities but the finest cost more.
    samples = one_step()
    samples.budget_tokens[0, 0, 0, 0, 0] = 800
    predictions = given(16)
    rating = Judge(samples, 0).rate(
        predictions._replace(log2_fraction=predictions.log2_fraction + np.asarray([0, 9, 9, 9])),
        0.0,
        0.0,
    )
    assert rating.error_left == pytest.approx((0.2 - 0.1) / 2)


def test_errors_of_a_step_add_up_as_norms():
    samples = one_step()
    samples.budget_tokens[0, :, :, 1, 3] = 64
    samples.window_error[0, 1, 3] = 0.5
    rating = Judge(samples, 0).rate(given(64, heads=0), 0.0, 0.0)
    assert rating.error_left == pytest.approx(np.hypot(0.3, 0.4) / 2)


def random_needs(seed: int = 0, steps: int = 250) -> tuple[HeadSamples, Predictions]:
    rng = np.random.default_rng(seed)
    shape = (steps, 2, 4)
    streams = rng.random(shape) < 0.7
    log2 = rng.uniform(-6, -1, shape)[..., None] + 0.3 * np.arange(4)
    tokens = np.ceil(np.exp2(log2) * HOST / SIZES) * SIZES
    budgets = np.where(streams[..., None], 0, tokens)[..., None, :] * np.ones((3, 1))
    budgets[..., 2, :] = 0
    error = np.where(streams, 0.05, rng.uniform(0.2, 0.5, shape))
    logit = np.where(streams, 2.0, -2.0) + rng.standard_normal(shape)
    predicted = log2 + 0.5 * rng.standard_normal((*shape, 1))
    return needs(budgets, error), Predictions(logit, predicted)


@pytest.mark.parametrize(
    ("under_budget", "error_left"), [(0.03, 1.0), (0.3, 0.02), (0.3, 0.2), (1e-9, 1e-9)]
)
def test_the_safety_keeps_both_limits_and_gives_no_more_than_needed(under_budget, error_left):
    samples, predictions = random_needs()
    judge = Judge(samples, 0)
    safety = judge.choose_safety(predictions, under_budget, error_left)
    rating = judge.rate(predictions, *safety)
    assert rating.under_budget <= under_budget
    assert rating.error_left <= error_left
    # No pair on a grid does better while it keeps the limits.
    for threshold in np.linspace(-3, 4, 8):
        for margin in np.linspace(-1, 3, 9):
            tried = judge.rate(predictions, threshold, margin)
            if tried.under_budget <= under_budget and tried.error_left <= error_left:
                assert tried.given_fraction >= 0.97 * rating.given_fraction


def test_harmless_misses_cost_nothing():
    samples, predictions = random_needs()
    # Their error without the host is hardly above the tolerance.
    harmless = samples._replace(window_error=np.minimum(samples.window_error, np.float32(0.101)))
    rated = []
    for own in (samples, harmless):
        judge = Judge(own, 0)
        rated.append(judge.rate(predictions, *judge.choose_safety(predictions, 1.0, 0.02)))
    assert rated[1].given_fraction < 0.2 * rated[0].given_fraction
    assert rated[1].missed > rated[0].missed


def test_where_nothing_helps_nothing_streams():
    budgets = np.full((1, 2, 4, 3, 4), HOST)
    samples = needs(budgets, np.ones((1, 2, 4)))
    predictions = Predictions(np.arange(8.0).reshape(1, 2, 4), np.full((1, 2, 4, 4), -40.0))
    threshold, margin = Judge(samples, 0).choose_safety(predictions, 0.01, 0.01)
    assert threshold > 7.0
    assert margin == 12.0


def test_equal_logits_stream_together():
    # A class that is only yes or no, as the label of the step before is.
    streams = (np.arange(1000) % 4 > 0).reshape(125, 2, 4)
    budgets = np.where(streams, 0, 256)[..., None, None] * np.ones((3, 4))
    samples = needs(budgets, np.where(streams, 0.05, 0.9))
    predictions = Predictions(streams.astype(float), np.full((125, 2, 4, 4), np.log2(256 / HOST)))
    judge = Judge(samples, 0)
    rating = judge.rate(predictions, *judge.choose_safety(predictions, 0.01, 0.01))
    assert rating.accuracy == 1
    assert rating.over_provisioning == pytest.approx(1)
