"""Recorded steps against the product's own decode steps, and against labels by brute force."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fluxion_jax as fx
from fluxion_jax.calibration.recording import record
from fluxion_jax.calibration.texts import CalibrationText
from fluxion_jax.decode import NO_TOKEN
from fluxion_jax.evaluation.labels import make_labels
from fluxion_jax.models.load import LoadedModel
from fluxion_jax.policy.features import NAMES
from fluxion_jax.policy.split import one_sided
from tests.generation import tiny
from tests.policy.recorder import FeatureRecorder

STEPS = 20  # A block leaves the window meanwhile.
ERRORS = (0.02, 0.1, 0.3)
# Rounding is relative to scores, of which these are differences.
CLOSE = {"rtol": 2e-3, "atol": 2e-3}


def texts(following: tuple[int, ...] = ()) -> list[CalibrationText]:
    first, second = tiny.prompts([501, 420])
    return [
        CalibrationText("answer", tuple(first), (), STEPS, 0, 576),
        CalibrationText("prose", tuple(second), following, STEPS - 3, 70, 576),
    ]


def recorded(model, rows, **options):
    defaults = {"slots": STEPS + 2, "errors": ERRORS, "stop_tokens": ()}
    return record(
        model,
        rows,
        layout=model.config.kv_layout("float32", sketch=True),
        capacity_tokens=tiny.CAPACITY_TOKENS,
        chunk_tokens=tiny.CHUNK_TOKENS,
        **{**defaults, **options},
    )


@fx.jit
def product_step(params, cache, tokens, policy):
    model = nnx.merge(GRAPH[0], params)
    logits, cache, stats = model.decode_step(
        tokens, cache, policy, split=one_sided("host"), execution=tiny.ALWAYS_SPARSE
    )
    return jnp.argmax(logits, axis=-1), cache, stats.notes


GRAPH: list = []


def product_features(model, text: CalibrationText) -> np.ndarray:
    """Of the product: prefill, decode what is older, then the steps."""
    graph, params = nnx.split(model)
    GRAPH[:] = [graph]
    cache = tiny.new_cache(model, 1, sketch=True)
    prefilled = len(text.prompt) - 1 - text.age_tokens
    fx.prefill(
        model,
        [list(text.prompt[:prefilled])],
        cache,
        chunk_tokens=tiny.CHUNK_TOKENS,
        progress=False,
    )
    forced = [*text.prompt[prefilled:], *text.following]
    token, seen = None, []
    for i in range(text.age_tokens + text.steps):
        if i < len(forced):
            token = jnp.asarray([forced[i]], jnp.int32)
        token, cache, notes = product_step(params, cache, token, FeatureRecorder(fx.full()))
        seen.append(np.asarray(notes[:, 0]))
    return np.stack(seen[text.age_tokens :])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_features_are_those_of_the_products_step(family):
    model = getattr(tiny, family)()
    rows = texts(tuple(range(7, 7 + STEPS)))
    found = recorded(model, rows)
    for row, text in enumerate(rows):
        steps = found.running[:, row]
        assert steps.sum() == text.steps
        got = found.features[:, row][steps]
        expected = product_features(model, text)
        assert got.shape == expected.shape
        for i, name in enumerate(NAMES):
            np.testing.assert_allclose(
                got[..., i], expected[..., i], **CLOSE, err_msg=f"{text.name} {name}"
            )
    age = found.features[:, 1, 0, 0, NAMES.index("tokens_since_probe")]
    np.testing.assert_allclose(age[0], np.log2(1 + 71), rtol=1e-6)


@pytest.mark.slow
def test_budgets_are_the_smallest_of_the_oracles_ladder():
    model = tiny.llama()
    (tokens,) = tiny.prompts([560])
    first = 480  # The host's tokens stay the same from a multiple of a block on.
    text = CalibrationText(
        "text", tuple(tokens[: first + 1]), tuple(tokens[first + 1 :][:7]), 8, 0, 576
    )
    found = recorded(model, [text])
    loaded = LoadedModel(model, None, model.config, "tiny")
    (labels,) = make_labels(loaded, tokens, [first], steps=8, tolerances=ERRORS, progress=False)
    assert found.host_tokens[:8, 0].tolist() == [labels.host_tokens] * 8
    expected = np.moveaxis(labels.budget_tokens, 3, 0)
    got = found.budget_tokens[:8, 0]
    assert got.shape == expected.shape
    # Rungs are every unit up to five of them, and a fifth apart beyond.
    assert (got >= expected).all()
    few = expected <= 5 * 16
    np.testing.assert_array_equal(got[:, :, 0][few[:, :, 0]], expected[:, :, 0][few[:, :, 0]])
    assert 0.1 < (expected > 0).mean() < 1
    np.testing.assert_allclose(
        found.window_error[:8, 0], np.moveaxis(labels.window_error, 1, 0), rtol=1e-3, atol=1e-5
    )


@pytest.mark.slow
def test_an_answer_ends_at_its_stop_token_and_batches_do_not_matter():
    model = tiny.llama()
    whole = recorded(model, texts())
    alone = recorded(model, texts()[:1])
    steps = whole.running[:, 0]
    np.testing.assert_allclose(alone.features[:, 0], whole.features[steps][:, 0], **CLOSE)
    cache = tiny.new_cache(model, 1)
    answer = tiny.generate(
        model, [list(texts()[0].prompt)], policy="full", cache=cache, max_new_tokens=STEPS
    ).tokens[0]
    stop = int(answer[4])
    ended = recorded(model, texts()[:1], stop_tokens=(stop,))
    assert ended.running[:, 0].sum() == answer.tolist().index(stop) + 1
    assert stop != NO_TOKEN
