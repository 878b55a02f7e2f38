from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fluxion_jax as fx
from fluxion_jax.sampling import sample
from tests.generation import tiny

draw = jax.jit(sample)


def drawn(logits, sampling, seed=0, count=4000):
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    return np.asarray(draw(rows, sampling, jax.random.key(seed), jnp.zeros(count, jnp.int32)))


def test_greedy_takes_the_lowest_of_equals():
    assert set(drawn([1.0, 5.0, 5.0, -2.0], fx.greedy())) == {1}


def test_the_nucleus_is_the_smallest_set_that_reaches_the_mass():
    logits = np.log([0.05, 0.5, 0.3, 0.15])
    assert set(drawn(logits, fx.top_p(0.5))) == {1}
    assert set(drawn(logits, fx.top_p(0.51))) == {1, 2}
    assert set(drawn(logits, fx.top_p(0.81))) == {1, 2, 3}
    assert set(drawn(logits, fx.top_p(1.0))) == {0, 1, 2, 3}


def test_draws_follow_the_probabilities_of_the_nucleus():
    logits = np.log([0.05, 0.5, 0.3, 0.15])
    shares = np.bincount(drawn(logits, fx.top_p(0.7)), minlength=4) / 4000
    np.testing.assert_allclose(shares, [0, 0.5 / 0.8, 0.3 / 0.8, 0], atol=0.03)


def test_only_so_many_of_the_likeliest_are_drawn():
    logits = np.log([0.05, 0.5, 0.3, 0.15])
    assert set(drawn(logits, fx.top_p(1.0, top_k=1))) == {1}
    assert set(drawn(logits, fx.top_p(1.0, top_k=3))) == {1, 2, 3}
    assert set(drawn(logits, fx.top_p(1.0, top_k=10**12))) == {0, 1, 2, 3}
    # Among the two likeliest the first has 0.625, which alone reaches a nucleus of 0.6.
    assert set(drawn(logits, fx.top_p(0.6, top_k=2))) == {1}
    shares = np.bincount(drawn(logits, fx.top_p(1.0, top_k=2)), minlength=4) / 4000
    np.testing.assert_allclose(shares, [0, 0.625, 0.375, 0], atol=0.03)


@pytest.mark.parametrize("top_k", [0, -3, 2.5, True])
def test_a_count_out_of_range_is_refused(top_k):
    with pytest.raises(fx.ConfigError, match="expected an integer top_k >= 1 or None"):
        fx.top_p(0.9, top_k=top_k)


def test_temperature_divides_the_logits():
    logits = np.log([0.2, 0.8])
    hot = np.mean(drawn(logits, fx.top_p(1.0, temperature=2.0)) == 1)
    assert hot == pytest.approx(0.8**0.5 / (0.8**0.5 + 0.2**0.5), abs=0.03)
    assert np.mean(drawn(logits, fx.top_p(1.0, temperature=0.01)) == 1) == 1.0


def test_a_tiny_nucleus_is_greedy_and_extreme_logits_do_no_harm():
    assert set(drawn([1e30, -1e30, 0.0], fx.top_p(1e-6))) == {0}
    assert set(drawn([-np.inf, 0.0, -np.inf], fx.top_p(0.9))) == {1}


def test_rows_positions_and_seeds_draw_apart():
    logits = np.zeros(64)
    assert len(set(drawn(logits, fx.top_p(1.0), count=64))) > 20
    rows = jnp.zeros((1, 4096))
    at = [int(draw(rows, fx.top_p(1.0), jax.random.key(0), jnp.asarray([p]))[0]) for p in range(5)]
    by_seed = [
        int(draw(rows, fx.top_p(1.0), jax.random.key(s), jnp.asarray([0]))[0]) for s in range(5)
    ]
    assert len(set(at)) > 3
    assert len(set(by_seed)) > 3


@pytest.mark.parametrize("p", [0.0, -0.1, 1.1, float("nan")])
def test_a_nucleus_out_of_range_is_refused(p):
    with pytest.raises(fx.ConfigError, match=r"top-p in \(0, 1\]"):
        fx.top_p(p)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_a_temperature_out_of_range_is_refused(temperature):
    with pytest.raises(fx.ConfigError, match=r"temperature > 0, .*got .*; use greedy"):
        fx.top_p(0.9, temperature=temperature)


def test_a_seed_reproduces_a_generation_however_it_is_cut():
    model, rows, sampling = tiny.llama(), tiny.prompts(), fx.top_p(0.95, temperature=1.5)
    whole = tiny.generate(model, rows, max_new_tokens=50, sampling=sampling, seed=7)
    again = tiny.generate(model, rows, max_new_tokens=50, sampling=sampling, seed=7)
    other = tiny.generate(model, rows, max_new_tokens=50, sampling=sampling, seed=8)
    part = tiny.generate(model, rows, max_new_tokens=11, sampling=sampling, seed=7)
    rest = tiny.generate(
        model,
        [tokens[-1:].tolist() for tokens in part.tokens],
        cache=part.cache,
        max_new_tokens=39,
        sampling=sampling,
        seed=7,
    )
    for row in range(3):
        np.testing.assert_array_equal(again.tokens[row], whole.tokens[row])
        cut = np.concatenate([part.tokens[row], rest.tokens[row]])
        np.testing.assert_array_equal(cut, whole.tokens[row])
        assert (other.tokens[row] != whole.tokens[row]).any()
    greedy = tiny.generate(model, rows, max_new_tokens=50)
    assert (greedy.tokens[0] != whole.tokens[0]).any()
