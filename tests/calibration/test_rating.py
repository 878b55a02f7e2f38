from __future__ import annotations

import numpy as np
import pytest

from fluxion_jax.calibration.rating import choose_safety, in_tokens, rate, with_safety

HOST = 1024


def hosts(count: int) -> np.ndarray:
    return np.full(count, HOST, np.int32)


def test_budgets_are_rounded_up_to_units_and_cut():
    fraction = np.log2(np.asarray([[16, 17, 65, 129], [HOST, HOST, 4 * HOST, 1]]) / HOST)
    np.testing.assert_array_equal(
        in_tokens(fraction, hosts(2)), [[16, 32, 128, 256], [HOST, HOST, HOST, 128]]
    )
    assert not in_tokens(np.full((1, 4), -np.inf), hosts(1)).any()


def test_a_rating_counts_heads_that_fall_short():
    needed = np.log2(np.asarray([[16, 32, 64, 128], [64, 64, 64, 128]]) / HOST)
    streaming = np.full((1, 4), -np.inf)
    needed = np.concatenate([needed, streaming, streaming])
    given = np.concatenate([needed[:1], needed[1:2] - [[1, 0, 0, 0]], streaming, needed[:1]])
    rating = rate(given, needed, hosts(4))
    assert rating.under_budget == 1 / 16
    assert rating.missed == 1 / 8
    assert rating.accuracy == 3 / 4
    assert rating.over_provisioning == pytest.approx((240 + 288 + 240) / (240 + 320))
    assert rating.needed_fraction == pytest.approx(560 / 16 / HOST)


@pytest.mark.parametrize("target", [0.0, 0.01, 0.03, 0.2])
def test_the_safety_keeps_the_rate_and_gives_no_more_than_needed(target):
    rng = np.random.default_rng(0)
    count = 4000
    need = rng.uniform(-6, 0, (count, 1)) + 0.3 * np.arange(4)
    streams = rng.random(count) < 0.6
    needed = np.where(streams[:, None], -np.inf, np.minimum(need, 0.0))
    # Whole units, as labels are.
    sizes = np.asarray([16, 32, 64, 128])
    tokens = np.ceil(np.exp2(needed) * HOST / sizes) * sizes
    with np.errstate(divide="ignore"):
        needed = np.log2(tokens / HOST)
    logit = np.where(streams, 2.0, -2.0) + rng.standard_normal(count)
    predicted = need + 0.5 * rng.standard_normal((count, 1))

    threshold, margin = choose_safety(logit, predicted, needed, hosts(count), target, 1.0)
    rating = rate(with_safety(logit, predicted, threshold, margin), needed, hosts(count))
    assert rating.under_budget <= target
    best = rating.given_fraction
    if target:
        assert (logit > threshold).any()
        # No pair on a grid does better while it keeps the rate.
        for other in np.linspace(-1, 5, 31):
            for extra in np.linspace(-1, 3, 21):
                tried = rate(with_safety(logit, predicted, other, extra), needed, hosts(count))
                if tried.under_budget <= target:
                    assert tried.given_fraction >= 0.97 * best


def test_where_nothing_helps_nothing_streams():
    needed = np.zeros((3, 4))
    predicted = np.full((3, 4), -40.0)
    threshold, margin = choose_safety(np.arange(3.0), predicted, needed, hosts(3), 0.0, 1.0)
    assert threshold > 2.0
    assert margin == 12.0


def test_where_few_heads_need_anything_most_of_them_get_it():
    rng = np.random.default_rng(1)
    retrieves = np.arange(2000) % 50 == 0
    needed = np.where(retrieves[:, None], -2.0, -np.inf) * np.ones(4)
    logit = np.where(retrieves, -1.0, 1.0) + rng.standard_normal(2000)
    predicted = np.full((2000, 4), -2.0)
    rated = []
    for missed in (1.0, 0.1):
        safety = choose_safety(logit, predicted, needed, hosts(2000), 0.03, missed)
        rated.append(rate(with_safety(logit, predicted, *safety), needed, hosts(2000)))
    assert rated[0].missed == 1.0
    assert rated[1].missed <= 0.1
    assert rated[1].given_fraction > rated[0].given_fraction


def test_equal_logits_stream_together():
    # A class that is only yes or no, as the label of the step before is.
    streams = np.arange(1000) % 4 > 0
    needed = np.where(streams[:, None], -np.inf, np.log2(256 / HOST)) * np.ones(4)
    predicted = np.full((1000, 4), np.log2(256 / HOST))
    logit = streams.astype(float)
    threshold, margin = choose_safety(logit, predicted, needed, hosts(1000), 0.01, 1.0)
    rating = rate(with_safety(logit, predicted, threshold, margin), needed, hosts(1000))
    assert rating.accuracy == 1
    assert rating.over_provisioning == pytest.approx(1)
