"""What a calibration reads is not what the frozen protocol, or real text, is evaluated on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fluxion_jax.calibration import texts
from fluxion_jax.calibration.texts import calibration_texts
from fluxion_jax.demo import long_text
from fluxion_jax.evaluation.runner import prompts_sha256
from fluxion_jax.evaluation.samples import Sample
from fluxion_jax.evaluation.tasks import TASKS, make_sample
from fluxion_jax.models.load import load_model

PROTOCOL = json.loads((Path(__file__).parents[2] / "benchmarks" / "protocol.json").read_text())
STEPS, POINTS, LENGTH = 8, 3, 1024


@pytest.fixture(scope="module")
def model():
    return load_model("recall-12m")


@pytest.fixture(scope="module")
def made(model):
    return calibration_texts(
        model, length_tokens=LENGTH, count=2 * len(TASKS), points=POINTS, steps=STEPS
    )


def test_questions_have_seeds_of_their_own(model, monkeypatch):
    asked: list[Sample] = []

    def recorded(task, tokenizer, length_tokens, seed):
        asked.append(make_sample(task, tokenizer, length_tokens, seed))
        seeds.append(seed)
        return asked[-1]

    seeds: list[int] = []
    monkeypatch.setattr(texts, "make_sample", recorded)
    calibration_texts(model, length_tokens=LENGTH, count=8, points=POINTS, steps=STEPS)
    frozen = range(PROTOCOL["seed"], PROTOCOL["seed"] + PROTOCOL["samples"])
    assert seeds == list(range(500_000, 500_004))
    # The largest calibration stays below the protocol, and evaluations count from 0.
    assert seeds[0] + 100_000 < frozen[0]
    hashes = {h for own in PROTOCOL["prompts_sha256"].values() for h in own.values()}
    assert not hashes & {prompts_sha256([sample]) for sample in asked}


def test_prose_is_not_that_of_the_evaluation():
    def sentences(text: str) -> set[str]:
        return {" ".join(p.split()) for p in text.split("\n\n") if len(p) > 80}

    evaluated = sentences(long_text())
    assert len(evaluated) > 500
    for source in texts._standard_library():
        read = sentences(source)
        assert len(read) > 500
        assert not evaluated & read


def test_every_task_is_asked_at_several_lengths(made):
    questions = made[1::2]
    assert {text.name for text in questions} == set(TASKS)
    assert len({text.name for text in questions[: len(TASKS) // 2]}) == len(TASKS) // 2
    assert len({len(text.tokens) // 256 for text in made}) > 1
    for text in made:
        assert len(text.tokens) <= LENGTH + 16 + STEPS
        assert text.first_positions == sorted(set(text.first_positions))
        assert all(p % 16 == 0 for p in text.first_positions)
        assert text.first_positions[-1] + STEPS <= len(text.tokens)


def test_the_last_stretches_of_a_question_are_its_answer(model, made):
    for text in made[1::2]:
        starts = [p for p in text.first_positions if p >= len(text.tokens) - 16 - STEPS - 1]
        assert len(starts) in (1, 2)
        answer = model.tokenizer.decode(text.tokens[starts[0] + 1 :])
        assert answer.startswith(" ")
    before = max(POINTS // 3, 1)
    assert {len(t.first_positions) for t in made[1::2]} == {before + 1, before + 2}
