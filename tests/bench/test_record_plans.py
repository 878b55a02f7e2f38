"""The tool that records plans of real heads: what it captures, labels, predicts and counts."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from fluxion_jax.bench.capture import capture
from fluxion_jax.bench.replayed import random_predictor
from fluxion_jax.evaluation.labels import make_labels
from fluxion_jax.models import Decoder, LoadedModel, ModelConfig

_PATH = Path(__file__).resolve().parents[2] / "tools" / "record_plans.py"
FIRST, STEPS = 700, 2


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("record_plans", _PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def loaded():
    config = ModelConfig.tiny_llama()
    return LoadedModel(Decoder.random(config), None, config, "tiny")


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 256, FIRST + STEPS).tolist()


def test_captured_in_parts_is_what_is_captured_at_once(tool, loaded, tokens):
    positions = np.arange(FIRST, FIRST + STEPS)
    text = np.asarray(tokens, np.int32)
    once = capture(loaded.model, text, positions)
    for ours, theirs in zip(tool.captured(loaded.model, text, positions), once, strict=True):
        for got, want in zip(ours[:3], theirs[:3], strict=True):
            np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)


def test_needs_are_the_labels_and_unions_are_within_bounds(tool, loaded, tokens):
    budgets, read = tool.needs(loaded, tokens, FIRST, STEPS, 0.2)
    (labels,) = make_labels(loaded, tokens, [FIRST], steps=STEPS, tolerances=[0.2], progress=False)
    np.testing.assert_array_equal(
        budgets, np.moveaxis(labels.budget_tokens[0], 0, -1).swapaxes(0, 1)
    )
    group = loaded.config.num_heads // loaded.config.num_kv_heads
    for union, largest in read:
        assert largest <= union <= group * largest
    # 3 units of 16 tokens, the largest head's, in each group of each layer and step.
    assert read[1, 1] == 48 * STEPS * loaded.config.num_layers * loaded.config.num_kv_heads


@pytest.mark.slow
def test_predicted_budgets_are_those_of_the_policy(tool, loaded, tokens):
    policy = random_predictor(loaded.config)
    budgets = tool.predicted(loaded, tokens, FIRST, STEPS, policy)
    shape = (STEPS, loaded.config.num_layers, loaded.config.num_heads, 4)
    assert budgets.shape == shape
    assert budgets.max() <= FIRST - 320
    needs, _ = tool.needs(loaded, tokens, FIRST, STEPS, 0.2, policy)
    np.testing.assert_array_equal(needs, budgets)
    # A safer policy lets no head stream and reads all there is.
    bold = jax.tree.map(lambda x: x, policy)
    object.__setattr__(bold.safety, "streaming_logit", policy.safety.streaming_logit + 1e9)
    object.__setattr__(bold.safety, "margin", policy.safety.margin + 99.0)
    assert (tool.predicted(loaded, tokens, FIRST, STEPS, bold) == (FIRST - 320) // 16 * 16).all()
