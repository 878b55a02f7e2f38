"""Generators keep to the published structure; answers are there; lengths are kept to."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from fluxion_jax.errors import ConfigError
from fluxion_jax.evaluation import METRICS, TASKS, make_sample

LENGTH = 2048


class Words:
    """A tokenizer of pieces of up to four letters or digits, like those of real vocabularies."""

    def encode(self, text: str) -> list[int]:
        return [len(piece) for piece in re.findall(r"[A-Za-z]{1,4}|\d{1,3}|\S", text)]


def sample(task: str, length: int = LENGTH, seed: int = 0, **options):
    return make_sample(task, Words(), length, seed, **options)


@pytest.mark.parametrize("task", TASKS)
def test_length_is_kept_to_and_used(task):
    for length in (1024, 4096):
        made = sample(task, length)
        used = len(made.tokens) + made.max_new_tokens
        assert 0.95 * length <= used <= length


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_in_the_prompt_and_score_full_marks(task):
    for seed in range(5):
        made = sample(task, seed=seed)
        assert all(reference in made.prompt for reference in made.references)
        assert METRICS[made.metric](" ".join(made.references), made.references) == 1
        assert METRICS[made.metric]("", made.references) == 0


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_says_everything(task):
    assert sample(task, seed=3) == sample(task, seed=3)
    assert sample(task, seed=3).references != sample(task, seed=4).references


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.has_depth])
def test_the_answer_lies_at_the_depth_asked_for(task):
    places = []
    for depth in (0.0, 0.5, 1.0):
        made = sample(task, depth_fraction=depth)
        assert made.depth_fraction == depth
        places.append(made.prompt.index(made.references[0]) / len(made.prompt))
    assert places[0] < 0.25 < 0.35 < places[1] < 0.65 < 0.75 < places[2]


NEEDLE = re.compile(r"One of the special magic (?:number|uuid)s for (\S+) is: (\S+)\.")
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


@pytest.mark.parametrize(
    ("task", "keys", "values", "answers"),
    [
        ("niah_single_1", 1, 1, 1),
        ("niah_single_2", 1, 1, 1),
        ("niah_single_3", 1, 1, 1),
        ("niah_multikey_1", 4, 1, 1),
        ("niah_multivalue", 1, 4, 4),
        ("niah_multiquery", 4, 1, 4),
    ],
)
def test_needles_are_as_many_as_published(task, keys, values, answers):
    made = sample(task)
    found = NEEDLE.findall(made.prompt)
    assert len(found) == keys * values
    assert len({key for key, _ in found}) == keys
    assert len({value for _, value in found}) == keys * values
    assert len(made.references) == answers
    pattern = UUID if task == "niah_single_3" else re.compile(r"[1-9]\d{6}")
    assert all(pattern.fullmatch(value) for _, value in found)


@pytest.mark.parametrize("task", ["niah_multikey_2", "niah_multikey_3"])
def test_distractors_fill_the_haystack(task):
    made = sample(task)
    found = NEEDLE.findall(made.prompt)
    assert len(made.prompt.splitlines()) == len(found) + 3
    assert len({key for key, _ in found}) == len(found) > 20
    (asked,) = re.findall(r"magic \w+ for (\S+) mentioned in the text above\?", made.prompt)
    assert dict(found)[asked] == made.references[0]


def test_variables_form_one_chain_in_order():
    made = sample("vt")
    text = made.prompt.split("\n\n")[1]
    first, *rest = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", text)
    assert len(rest) == 4
    assert (first[0], *(name for name, _ in rest)) == made.references
    assert [source for _, source in rest] == list(made.references[:-1])
    assert re.fullmatch(r"\d{5}", first[1])
    assert f"value {first[1]} in the text above?" in text


@pytest.mark.parametrize(("length", "common", "other"), [(2048, 6, 1), (4096, 30, 3)])
def test_common_words_are_counted_as_published(length, common, other):
    made = sample("cwe", length)
    listed = made.prompt.split("\n\n")[1].splitlines()[1]
    counts = Counter(re.findall(r"\d+\. (\w+)", listed))
    assert len(made.references) == 10
    assert all(counts[word] == common for word in made.references)
    assert {n for word, n in counts.items() if word not in made.references} == {other}


def test_frequent_words_follow_the_zeta_distribution():
    made = sample("fwe", 4096)
    counts = Counter(made.prompt.splitlines()[1].split()).most_common(4)
    assert counts[0][0] == "..."
    assert tuple(word for word, _ in counts[1:]) == made.references
    for rank, (_, count) in enumerate(counts, 1):
        assert count == pytest.approx(counts[0][1] / rank**2, abs=1)
    assert all(re.fullmatch(r"[a-z]{6}", word) for word in made.references)


def test_key_values_are_one_json_object():
    made = sample("key_value")
    found = json.loads(re.search(r"\{.*\}", made.prompt, re.S).group())
    asked = re.search(r"value of the key \"([^\"]+)\"\?", made.prompt).group(1)
    assert found[asked] == made.references[0]
    assert len(found) > 10


def test_the_completed_function_is_real_code_seen_once():
    made = sample("code_completion")
    assert made.prompt.count(made.references[0]) == 1
    scope = {}
    exec(made.prompt + made.references[0], scope)
    assert made.prompt.count("def " + made.prompt.rsplit("def ", 1)[1]) == 2


def test_wrong_requests_are_refused():
    with pytest.raises(ConfigError, match=r"expected a task out of niah_single_1, .* got 'x'"):
        sample("x")
    with pytest.raises(ConfigError, match=r"expected at least \d+ tokens for cwe .* got .*=300"):
        sample("cwe", 300)
    with pytest.raises(ConfigError, match=r"expected a depth .* got 0\.5 for vt"):
        sample("vt", depth_fraction=0.5)
    with pytest.raises(ConfigError, match=r"expected a depth .* got 1\.5"):
        sample("passkey", depth_fraction=1.5)
