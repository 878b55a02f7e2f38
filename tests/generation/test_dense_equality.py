"""Generating under `full` is greedy decoding of the model without a cache."""

from __future__ import annotations

import numpy as np
import pytest

import fluxion_jax as fx
from tests.generation import tiny

MODELS = {"llama": tiny.llama, "gemma3": tiny.gemma3}
# Shorter than the sinks, at the edge where the first block leaves the window, longer.
CASES = [
    pytest.param("llama", (9, 320, 500), id="llama-behind-the-window"),
    pytest.param("llama", (1, 335, 336), id="llama-at-the-first-block"),
    pytest.param("llama", (63, 64, 65), id="llama-at-the-sinks"),
    pytest.param("gemma3", (9, 336, 500), id="gemma3"),
]


@pytest.mark.parametrize(("name", "lengths"), CASES)
def test_full_is_greedy_decoding_of_the_dense_model(name, lengths):
    model = MODELS[name]()
    rows = tiny.prompts(lengths)
    result = tiny.generate(model, rows, max_new_tokens=40)
    sequences = [[*row, *new.tolist()] for row, new in zip(rows, result.tokens, strict=True)]
    for row, new, given, dense in zip(
        rows,
        result.tokens,
        result.log_probs,
        tiny.dense_log_probs(model, sequences),
        strict=True,
    ):
        predicted = dense[len(row) - 1 : -1]
        assert new.shape == (40,)
        assert new.dtype == np.int32
        np.testing.assert_array_equal(new, predicted.argmax(axis=-1))
        expected = np.take_along_axis(predicted, new[:, None], axis=-1)[:, 0]
        np.testing.assert_allclose(given, expected, atol=1e-4)
    fed = np.asarray([len(row) + 39 for row in rows])
    np.testing.assert_array_equal(result.cache.lengths, fed)


def test_a_small_budget_is_not_full_attention():
    """Or the tests above could not fail."""
    model, rows = tiny.llama(), tiny.prompts((9, 345, 500))
    full = tiny.generate(model, rows, max_new_tokens=40)
    sparse = tiny.generate(model, rows, max_new_tokens=40, policy="fixed:16:0.02")
    np.testing.assert_array_equal(sparse.tokens[0], full.tokens[0])
    assert np.abs(sparse.log_probs[2][:1] - full.log_probs[2][:1]).max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_a_continuation_is_scored_as_the_dense_model_does(name):
    model = MODELS[name]()
    rows = tiny.prompts((9, 300, 500), seed=1)
    following = np.asarray(tiny.prompts((46,) * 3, seed=2))
    cache = tiny.prefilled(model, rows)
    scores = fx.score(model, cache, following, execution=tiny.ALWAYS_SPARSE, progress=False)
    dense = tiny.dense_log_probs(
        model, [[*row, *ids] for row, ids in zip(rows, following.tolist(), strict=True)]
    )
    predicted = np.stack([d[len(r) : -1] for d, r in zip(dense, rows, strict=True)])
    expected = np.take_along_axis(predicted, following[:, 1:, None], axis=-1)[..., 0]
    assert scores.log_probs.shape == (3, 45)
    np.testing.assert_allclose(scores.log_probs, expected, atol=1e-4)
    np.testing.assert_array_equal(scores.likeliest, predicted.argmax(axis=-1))
    assert scores.perplexity == pytest.approx(np.exp(-expected.mean()), rel=1e-4)
    np.testing.assert_array_equal(cache.lengths, [9 + 45, 300 + 45, 500 + 45])
