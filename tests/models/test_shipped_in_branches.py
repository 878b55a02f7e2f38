"""Branches of a shared prefix against the product, on the shipped model and what it solves."""

from __future__ import annotations

import dataclasses

import pytest

from fluxion_jax.attention import Execution
from fluxion_jax.calibration.storage import policy_of
from fluxion_jax.evaluation.answers import answer, answer_together
from fluxion_jax.evaluation.runner import task_samples
from fluxion_jax.models import load_model
from fluxion_jax.policy import parse_policy

pytestmark = pytest.mark.slow

FIXED = ("full", "fixed:16:0.05", "fixed:16:0.05:group")
TASKS = ("niah_multikey_2", "vt", "passkey")
LENGTH_TOKENS, NEW_TOKENS = 1536, 32


def test_the_shipped_model_answers_in_bfloat16_as_in_the_product():
    model = load_model("recall-12m", dtype="bfloat16")
    samples = [
        dataclasses.replace(sample, max_new_tokens=NEW_TOKENS)
        for task in TASKS
        for sample in task_samples(model, task, LENGTH_TOKENS, range(2))
    ]
    policies = [*map(parse_policy, FIXED), policy_of(model, tolerance=0.2)]
    alone = answer(model, "", samples, policies, None, Execution(), progress=False)
    oracle = parse_policy("oracle:0.1")
    together = answer_together(model, "", samples, [*policies, oracle], None, Execution())
    compared = dict.fromkeys([*FIXED, "fluxion"], 0)
    for name, product, branch in zip(compared, alone, together, strict=False):
        assert branch["read_fraction"] == pytest.approx(product["read_fraction"], rel=5e-3), name
        assert branch["score"] == product["score"], name
        # A model that has lost the thread chooses between near ties, which rounding decides.
        for own, other, score in zip(
            product["tokens"], branch["tokens"], product["score"], strict=True
        ):
            if score == 1:
                assert other == own, name
                compared[name] += 1
    full, fixed, _, fluxion = alone
    # What reads too little loses the thread, and then what `fluxion` reads is chance as well.
    assert compared["full"] == compared["fluxion"] == len(samples)
    assert compared["fixed:16:0.05"] + compared["fixed:16:0.05:group"] >= 4
    assert 0 < fluxion["read_fraction"] < 1
    assert together[-1]["tokens"] == full["tokens"]
    assert 0 < together[-1]["read_fraction"] < fixed["read_fraction"]
