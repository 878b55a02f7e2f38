"""What a calibration reads is not what the frozen protocol, or real text, is evaluated on."""

from __future__ import annotations

import itertools
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
STEPS, LENGTH = 40, 2880
# A third of the tasks more for prose.
COUNT = -(-4 * len(TASKS) // 3)


@pytest.fixture(scope="module")
def model():
    return load_model("recall-12m")


@pytest.fixture(scope="module")
def made(model):
    return calibration_texts(model, length_tokens=LENGTH, count=COUNT, steps=STEPS)


def test_questions_have_seeds_of_their_own(model, monkeypatch):
    asked: list[Sample] = []

    def recorded(task, tokenizer, length_tokens, seed):
        asked.append(make_sample(task, tokenizer, length_tokens, seed))
        seeds.append(seed)
        return asked[-1]

    seeds: list[int] = []
    monkeypatch.setattr(texts, "make_sample", recorded)
    calibration_texts(model, length_tokens=LENGTH, count=8, steps=STEPS)
    frozen = range(PROTOCOL["seed"], PROTOCOL["seed"] + PROTOCOL["samples"])
    assert seeds == list(range(500_000, 500_006))
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
    questions = [text for text in made if text.name in TASKS]
    assert len(made) == COUNT
    assert {text.name for text in questions} == set(TASKS)
    assert len({text.name for text in questions[: len(TASKS) // 2]}) == len(TASKS) // 2
    assert len({text.length_tokens for text in questions}) == 3
    for text in questions:
        assert len(text.prompt) + text.steps <= text.length_tokens <= LENGTH
        assert text.steps == min(STEPS, TASKS[text.name].max_new_tokens)
        # The model answers.
        assert text.following == ()
        assert text.age_tokens == 0


def test_every_fourth_text_is_prose(made):
    prose = made[::4]
    assert all(text.name.startswith("text") for text in prose)
    assert sum(text.name.startswith("text") for text in made) == len(prose)
    assert len({text.age_tokens for text in prose}) == 4
    for text in prose:
        assert len(text.following) == text.steps == 16
        assert len(text.prompt) + text.steps == text.length_tokens <= LENGTH


def test_own_text_takes_the_place_of_prose(model, tmp_path):
    (tmp_path / "own.txt").write_text(" ".join(f"word{i}" for i in range(9000)))
    made = calibration_texts(
        model, length_tokens=LENGTH, count=5, steps=STEPS, data=tmp_path / "own.txt"
    )
    assert model.tokenizer.decode(made[4].prompt).count("word") > 50
    assert [text.name in TASKS for text in made] == [False, True, True, True, False]


def test_questions_take_the_place_of_prose_that_there_is_not(model, tmp_path):
    (tmp_path / "own.txt").write_text(" ".join(f"word{i}" for i in range(2000)))
    made = calibration_texts(
        model, length_tokens=4000, count=24, steps=STEPS, data=tmp_path / "own.txt"
    )
    own = [i for i, text in enumerate(made) if text.name not in TASKS]
    assert len(made) == 24
    assert 2 <= len(own) < 6
    # Spread, so that each part of a split has both kinds.
    assert {j - i for i, j in itertools.pairwise(own)} == {24 // len(own)}
