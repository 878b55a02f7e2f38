"""What a calibration reads: prose, code and questions, none of which the evaluation uses.

Real text comes from the standard library or from the user's files. Questions are those of the
evaluation's generators with seeds of their own, followed by their answers, and are looked at where
the answer begins: there retrieval happens.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fluxion_jax.demo import DEMO_TOPICS, long_text
from fluxion_jax.errors import ConfigError
from fluxion_jax.evaluation.tasks import TASKS, make_sample
from fluxion_jax.models.load import LoadedModel

# A first position must be a multiple of a block, so that the host's tokens stay the same over the
# steps of a stretch.
_ALIGNMENT_TOKENS = 16
# Evaluations count from 0 and frozen protocols use larger seeds still.
_FIRST_SEED = 500_000
_MODULES = (
    "typing",
    "argparse",
    "inspect",
    "tarfile",
    "statistics",
    "difflib",
    "doctest",
    "ast",
    "turtle",
    "_pydecimal",
    "pydoc",
    "unittest.mock",
    "subprocess",
    "asyncio.base_events",
    "mailbox",
    "pickletools",
    "http.client",
    "logging",
    "zipfile",
    "datetime",
    "ssl",
    "shutil",
    "enum",
    "smtplib",
)
# Answers are wanted far and near: after the whole length, half of it and a quarter.
_SHORTER = (1, 2, 4)
# A question has this many times fewer stretches before its answer than prose has.
_BEFORE_ANSWER = 3
# Coprime to the number of tasks: whatever part of the texts is taken, its tasks differ in kind.
_TASK_STRIDE = 5
_SUFFIXES = {".txt", ".md", ".rst", ".py", ".json"}


class CalibrationText(NamedTuple):
    """A token sequence and where to look at it.

    Attributes:
      name: what it is, for the report.
      tokens: the sequence.
      first_positions: where stretches of decode steps begin, ascending.
    """

    name: str
    tokens: list[int]
    first_positions: list[int]


def calibration_texts(
    model: LoadedModel,
    *,
    length_tokens: int,
    count: int,
    points: int,
    steps: int,
    data: Path | None = None,
) -> list[CalibrationText]:
    """Makes the texts of a calibration.

    Args:
      model: its tokenizer counts the tokens.
      length_tokens: of every third text; others are half and a quarter as long.
      count: texts in all; without `data` every other one is a question.
      points: stretches of each prose text; a question has a third of them before it is asked, one
        where its answer begins, and one more further on in a long answer.
      steps: of a stretch.
      data: a UTF-8 file, or a folder of which text, Markdown, Python and JSON files are read; None
        takes the standard library and questions.

    Raises:
      ConfigError: no tokenizer, a length out of range, or too little text.
    """
    if model.tokenizer is None:
        raise ConfigError(f"expected a model with a tokenizer, got {model.name} without one")
    layout = model.config.kv_layout()
    shortest = 2 * (layout.sink_tokens + layout.recent_tokens) + steps
    limit = model.config.max_context_tokens
    if not shortest <= length_tokens <= limit:
        raise ConfigError(
            f"expected a length of {shortest} to {limit} tokens for {model.name}, got "
            f"{length_tokens}; change it"
        )
    num_questions = count // 2 if data is None else 0

    def lengths(number: int) -> list[int]:
        shares = (_SHORTER[i % len(_SHORTER)] for i in range(number))
        return [max(length_tokens // share, shortest) for share in shares]

    texts = [
        CalibrationText(f"text {i}", tokens, _positions(len(tokens), points, steps, shortest // 2))
        for i, tokens in enumerate(_prose(model, lengths(count - num_questions), data))
    ]
    questions = [
        _question(model, length, i, points, steps)
        for i, length in enumerate(lengths(num_questions))
    ]
    # Interleaved, so that each part of a split has both kinds.
    mixed = [x for pair in zip(texts, questions, strict=False) for x in pair]
    return mixed + texts[len(questions) :]


def _positions(length_tokens: int, points: int, steps: int, first: int) -> list[int]:
    last = length_tokens - steps - 1
    # More of the long than of the short: there the plans matter most.
    spaced = np.linspace(first, last, points + 1)[1:]
    return sorted({int(p) // _ALIGNMENT_TOKENS * _ALIGNMENT_TOKENS for p in spaced})


def _question(
    model: LoadedModel, length_tokens: int, index: int, points: int, steps: int
) -> CalibrationText:
    assert model.tokenizer is not None
    task = sorted(TASKS)[index * _TASK_STRIDE % len(TASKS)]
    # The repeated answer must find room in the model's context.
    fits = model.config.max_context_tokens - _ALIGNMENT_TOKENS - steps
    sample = make_sample(task, model.tokenizer, min(length_tokens, fits), _FIRST_SEED + index)
    prompt = list(sample.tokens)
    # The last token of the prompt is the first that a generation decodes.
    prompt = prompt[(len(prompt) - 1) % _ALIGNMENT_TOKENS :]
    answer = model.tokenizer.encode(" " + ", ".join(sample.references) + ".\n")
    layout = model.config.kv_layout()
    first = layout.sink_tokens + layout.recent_tokens
    # Before the question is asked, its text is like any other: the answer is what it is here for.
    before = max(points // _BEFORE_ANSWER, 1)
    positions = _positions(len(prompt) - 2 * steps, before, steps, first)
    positions.append(len(prompt) - 1)
    if len(answer) >= _ALIGNMENT_TOKENS + steps:
        positions.append(len(prompt) - 1 + _ALIGNMENT_TOKENS)
    # A short answer is followed by itself: heads must have something to do in every step.
    tokens = prompt + (answer * (_ALIGNMENT_TOKENS + steps))[: _ALIGNMENT_TOKENS + steps]
    return CalibrationText(task, tokens, positions)


def _prose(model: LoadedModel, lengths: Sequence[int], data: Path | None) -> list[list[int]]:
    assert model.tokenizer is not None
    found: list[list[int]] = []
    longest = max(lengths)
    for text in _standard_library() if data is None else _files(data):
        tokens = model.tokenizer.encode(text)
        for start in range(0, len(tokens) - longest + 1, longest):
            found.append(tokens[start : start + longest])
    if len(found) < len(lengths):
        raise ConfigError(
            f"expected text for {len(lengths)} sequences of {longest} tokens, got {len(found)}; "
            "give more or longer files, or ask for fewer or shorter sequences"
        )
    # Spread over all there is.
    chosen = np.linspace(0, len(found) - 1, len(lengths)).astype(int)
    return [found[i][:length] for i, length in zip(chosen, lengths, strict=True)]


def _standard_library() -> Iterator[str]:
    """Prose that the demo and the evaluation leave out, and source code."""
    topics = importlib.import_module("pydoc_data.topics").topics
    # Topics repeat each other in part.
    taken = set(map(_words, long_text().split("\n\n")))
    paragraphs = (
        paragraph
        for name in sorted(topics)
        if name not in DEMO_TOPICS
        for paragraph in topics[name].split("\n\n")
    )
    yield "\n\n".join(p for p in paragraphs if _words(p) not in taken)
    # Modules that are shorter than a text would be of no use alone.
    yield "\n\n".join(_sources())


def _words(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _sources() -> Iterator[str]:
    for name in _MODULES:
        found = importlib.util.find_spec(name)
        if found is not None and found.origin is not None:
            yield Path(found.origin).read_text(encoding="utf-8")


def _files(data: Path) -> Sequence[str]:
    data = data.expanduser()
    if not data.exists():
        raise ConfigError(f"expected a file or a folder, got {data}; check the path")
    files = [data] if data.is_file() else sorted(data.rglob("*"))
    chosen = [f for f in files if f.is_file() and (f == data or f.suffix in _SUFFIXES)]
    try:
        return [f.read_text(encoding="utf-8") for f in chosen]
    except UnicodeDecodeError as error:
        raise ConfigError(f"expected UTF-8 text in {data}, got bytes that are not") from error
