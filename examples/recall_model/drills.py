"""Task prompts with several questions each, in the formats of `fluxion_jax.evaluation`.

A drill is a context and turns of question and answer; the context with the first question is a
prompt of the evaluation. Where the evaluation asks once, a drill asks for more of what its
context holds: many answers a sequence are what makes retrieval heads form quickly.
"""

from __future__ import annotations

import itertools
import random
import re
import string
from collections.abc import Sequence
from typing import NamedTuple

from fluxion_jax.evaluation.samples import Request
from fluxion_jax.evaluation.tasks import TASKS
from fluxion_jax.evaluation.words import essay_sentences, names, noise_lines, numbers, uuids

_PAIR = re.compile(r'"([0-9a-f-]{36})": "([0-9a-f-]{36})"')
_FUNCTION = re.compile(r"def (\w+)\(x\):\n(    x = .*\n    x = .*\n    return .*)\n")
# Beginnings of the question in the prompts that come from the evaluation's own builders.
_QUESTION = {
    "passkey": "What is the pass key?",
    "cwe": "Question: What are the",
    "fwe": "Question: Ignore the dots",
    "key_value": "Question: What is the value of the key",
    "code_completion": "\n# second.py, the same function again",
}
_LIST_START = "remember those.\n"
_NUM_HOPS = 4


class Drill(NamedTuple):
    """A context and its turns, each a question and the answer that is to follow it."""

    context: str
    turns: list[tuple[str, str]]


def answer_text(task: str, prompt: str, references: Sequence[str]) -> str:
    """How the model is taught to write the answer of an evaluation's sample.

    Where the order of the references is arbitrary, it is the order of appearance in the prompt.
    """
    found = list(references)
    if task == "niah_multivalue":
        found.sort(key=prompt.index)
    if task == "cwe":
        listed = prompt[prompt.rindex(_LIST_START) :].split()
        found.sort(key=listed.index)
        return "".join(f" {i}. {word}" for i, word in enumerate(found, 1))
    if task == "vt":
        return " " + " ".join(found)
    if task == "key_value":
        return f'{found[0]}"'
    if task == "code_completion":
        return f"{found[0]}\n"
    if len(found) == 1:
        return f" {found[0]}."
    return f" {', '.join(found[:-1])}, and {found[-1]}."


def _plant(rng: random.Random, hay: Sequence[str], needles: Sequence[str]) -> list[str]:
    places = sorted(rng.choices(range(len(hay) + 1), k=len(needles)))
    text: list[str] = []
    begin = 0
    for place, needle in zip(places, needles, strict=True):
        text += [*hay[begin:place], needle]
        begin = place
    return [*text, *hay[begin:]]


def needle_question(value: str, keys: Sequence[str], several: bool) -> str:
    """The question for some keys, with the beginning of its answer."""
    asked = keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + f", and {keys[-1]}"
    things, verb = (f"{value}s", "are") if several else (value, "is")
    wanted = f"all the special magic {things}" if several else f"the special magic {things}"
    return (
        f"What {verb} {wanted} for {asked} mentioned in the text above?\n"
        f"Answer: {wanted[0].upper()}{wanted[1:]} for {asked} mentioned in the text above {verb}"
    )


def needles(
    rng: random.Random,
    size: int,
    max_turns: int,
    *,
    hay: Sequence[str] | None,
    separator: str,
    key: str,
    value: str,
    num_keys: int,
    num_values: int,
    num_queries: int,
) -> Drill:
    """Needles in hay; without hay, `size` further needles are the hay."""
    if hay is None:
        num_keys += size
    keys = uuids(rng, num_keys) if key == "uuid" else names(rng, num_keys)
    draw = uuids if value == "uuid" else numbers
    owner = [k for k in keys for _ in range(num_values)]
    pairs = list(zip(owner, draw(rng, len(owner)), strict=True))
    rng.shuffle(pairs)
    lines = [f"One of the special magic {value}s for {k} is: {v}." for k, v in pairs]
    text = separator.join(lines if hay is None else _plant(rng, hay, lines))
    of_key: dict[str, list[str]] = {k: [] for k in keys}
    for k, v in pairs:
        of_key[k].append(v)
    num_queries = min(num_queries, num_keys)
    turns = []
    order = rng.sample(keys, len(keys))
    for first in range(0, len(keys) - num_queries + 1, num_queries):
        asked = order[first : first + num_queries]
        several = num_queries * num_values > 1
        values = [v for k in asked for v in of_key[k]]
        listed = f"{', '.join(values[:-1])}, and {values[-1]}" if several else values[0]
        turns.append((needle_question(value, asked, several), f" {listed}."))
    context = (
        f"Some special magic {value}s are hidden in the following text. Keep them in mind: you "
        f"will be asked for them afterwards.\n{text}\n"
    )
    return Drill(context, turns[:max_turns])


def _chain(rng: random.Random, num_names: int, letters: int) -> tuple[str, list[str], list[str]]:
    found: list[str] = []
    while len(found) < num_names:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name not in found:
            found.append(name)
    (value,) = numbers(rng, 1, digits=5)
    statements = [f"VAR {found[0]} = {value}"]
    statements += [f"VAR {b} = VAR {a}" for a, b in itertools.pairwise(found)]
    return value, found, statements


def _chains_context(text: str) -> str:
    return f"Follow the chain of variable assignments hidden in the following text.\n{text}\n"


def _chains_question(value: str, count: int) -> str:
    return (
        f"Question: Which variables have the value {value} in the text above?\n"
        f"Answer: By the assignments in the text above, {count} variables have the value {value}:"
    )


def chains(
    rng: random.Random, size: int, max_turns: int, *, num_chains: int, hops: int, example: bool
) -> Drill:
    """Chains of assignments in noise; with an example as in the evaluation, or without."""
    made = [_chain(rng, hops + 1, 5) for _ in range(num_chains)]
    hay = noise_lines(size)
    # Statements of a chain keep their order; chains lie between one another.
    merged = [iter(statements) for _, _, statements in made]
    order = [i for i, (_, _, s) in enumerate(made) for _ in s]
    rng.shuffle(order)
    text = "\n".join(_plant(rng, hay, [next(merged[i]) for i in order]))
    context = _chains_context(text)
    if example:
        value, found, statements = _chain(rng, _NUM_HOPS + 1, 3)
        shown = _chains_context("\n".join(_plant(rng, noise_lines(_NUM_HOPS), statements)))
        shown += f"{_chains_question(value, len(found))} {' '.join(found)}"
        context = f"{shown}\n\n{context}"
    turns = [(_chains_question(v, len(f)), " " + " ".join(f)) for v, f, _ in made]
    return Drill(context, turns[:max_turns])


def evaluation_drill(
    rng: random.Random, size: int, max_turns: int, *, task: str, room_tokens: int
) -> Drill:
    """A prompt of the evaluation's own builder; more turns where its context holds more."""
    draft = TASKS[task].build(Request(rng, size, room_tokens, None))
    begin = draft.prompt.rindex(_QUESTION[task])
    context, question = draft.prompt[:begin], draft.prompt[begin:]
    turns = [(question, answer_text(task, draft.prompt, draft.references))]
    if task == "key_value":
        (asked,) = set(re.findall(r'key "([0-9a-f-]{36})"', question))
        pairs = [pair for pair in _PAIR.findall(context) if pair[0] != asked]
        for k, v in rng.sample(pairs, min(max_turns - 1, len(pairs))):
            turns.append((question.replace(asked, k), f'{v}"'))
    if task == "code_completion":
        asked = question[question.rindex("def ") + 4 : question.rindex("(x)")]
        bodies = [pair for pair in _FUNCTION.findall(context) if pair[0] != asked]
        for name, body in rng.sample(bodies, min(max_turns - 1, len(bodies))):
            turns.append((f"def {name}(x):\n", f"{body}\n"))
    return Drill(context, turns)


def hay_of(rng: random.Random, kind: str, size: int, texts: Sequence[str]) -> tuple[list[str], str]:
    """Pieces of hay and what separates them: noise, the evaluation's prose, or training text."""
    if kind == "noise":
        return noise_lines(size), "\n"
    if kind == "essay":
        return essay_sentences(size), " "
    lines: list[str] = []
    while len(lines) < size:
        lines += rng.choice(texts).split("\n")
    begin = rng.randrange(len(lines) - size + 1)
    return lines[begin : begin + size], "\n"
