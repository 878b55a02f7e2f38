"""Branches of a shared prefix against the product, on the shipped model and what it solves."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from flax import nnx

from fluxion_jax.attention import Execution
from fluxion_jax.calibration.storage import make_policy
from fluxion_jax.evaluation.answers import answer, answer_together
from fluxion_jax.evaluation.runner import task_samples
from fluxion_jax.models import load_model
from fluxion_jax.policy import FluxionPolicy, parse_policy
from fluxion_jax.policy.fluxion_policy import Safety
from fluxion_jax.policy.head_predictor import HeadPredictor

pytestmark = pytest.mark.slow

FIXED = ("full", "fixed:16:0.05", "fixed:16:0.05:group")
TASKS = ("niah_multikey_2", "vt", "passkey")
LENGTH_TOKENS, NEW_TOKENS = 1536, 32


def a_predictor(config) -> FluxionPolicy:
    """Untrained: what it plans makes little sense, but each head and step gets another budget."""
    predictor = HeadPredictor(config.num_layers, config.num_heads, rngs=nnx.Rngs(0))
    predictor.heads[...] = 20 * predictor.heads[...]
    safety = Safety(*(np.asarray([x], np.float32) for x in (0.1, 0.1, -1.0)))
    return make_policy(predictor, safety, 0.1)


def test_the_shipped_model_answers_in_bfloat16_as_in_the_product():
    model = load_model("recall-12m", dtype="bfloat16")
    samples = [
        dataclasses.replace(sample, max_new_tokens=NEW_TOKENS)
        for task in TASKS
        for sample in task_samples(model, task, LENGTH_TOKENS, range(2))
    ]
    policies = [*map(parse_policy, FIXED), a_predictor(model.config)]
    alone = answer(model, "", samples, policies, None, Execution(), progress=False)
    oracle = parse_policy("oracle:0.1")
    together = answer_together(model, "", samples, [*policies, oracle], None, Execution())
    compared = 0
    for name, product, branch in zip([*FIXED, "fluxion"], alone, together, strict=False):
        assert branch["read_fraction"] == pytest.approx(product["read_fraction"], rel=5e-3), name
        assert branch["score"] == product["score"], name
        # A model that has lost the thread chooses between near ties, which rounding decides.
        for own, other, score in zip(
            product["tokens"], branch["tokens"], product["score"], strict=True
        ):
            if score == 1:
                assert other == own, name
                compared += 1
    full, fixed, _, fluxion = alone
    assert compared >= len(samples) + 4
    assert np.mean(full["score"]) == 1
    assert fluxion["tokens"] != full["tokens"]
    assert 0 < fluxion["read_fraction"] < 1
    assert together[-1]["tokens"] == full["tokens"]
    assert 0 < together[-1]["read_fraction"] < fixed["read_fraction"]
