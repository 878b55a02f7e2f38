"""What a calibration reads: prose, code and questions, none of which the evaluation uses.

Real text comes from the standard library or from the user's files. Questions are those of the
evaluation's generators with seeds of their own; the model answers them, and every token of the
answer is looked at: there retrieval happens, and a budget that is too small costs the answer.
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
# One text of so many is prose: answers are a few dozen steps at most, and where they need the host
# is what matters.
_PROSE_EVERY = 4
# Steps that are looked at in prose, whose needs are alike from one token to the next.
_PROSE_STEPS = 16
# What a prompt's end told of the heads is as old as the generation is long.
_AGES_TOKENS = (0, 16, 64, 256)
# Coprime to the number of tasks: whatever part of the texts is taken, its tasks differ in kind.
_TASK_STRIDE = 5
_SUFFIXES = {".txt", ".md", ".rst", ".py", ".json"}


class CalibrationText(NamedTuple):
    """A prompt, and the decode steps behind it that are looked at.

    Attributes:
      name: what it is, for the report.
      prompt: its last token is the first that is decoded.
      following: the tokens that come out; where there are none left, the model's own.
      steps: at most so many are looked at, and none behind a stop token.
      age_tokens: of the prompt, that were decoded after a prefill rather than prefilled.
      length_tokens: the length that was asked for, prompt and steps together.
    """

    name: str
    prompt: tuple[int, ...]
    following: tuple[int, ...]
    steps: int
    age_tokens: int
    length_tokens: int


def calibration_texts(
    model: LoadedModel,
    *,
    length_tokens: int,
    count: int,
    steps: int,
    data: Path | None = None,
) -> list[CalibrationText]:
    """Makes the texts of a calibration.

    Args:
      model: its tokenizer counts the tokens.
      length_tokens: of every third text; others are half and a quarter as long.
      count: texts in all; a fourth is prose, or as much of it as there is, and the others are
        questions.
      steps: at most, of a text.
      data: a UTF-8 file, or a folder of which text, Markdown, Python and JSON files are read, to
        take prose from; None takes the standard library.

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
    num_prose = -(-count // _PROSE_EVERY)

    def lengths(number: int) -> list[int]:
        shares = (_SHORTER[i % len(_SHORTER)] for i in range(number))
        return [max(length_tokens // share, shortest) for share in shares]

    prose_steps = min(steps, _PROSE_STEPS)
    prose = [
        CalibrationText(
            f"text {i}",
            tuple(tokens[:-prose_steps]),
            tuple(tokens[-prose_steps:]),
            prose_steps,
            _AGES_TOKENS[i % len(_AGES_TOKENS)],
            len(tokens),
        )
        for i, tokens in enumerate(_prose(model, lengths(num_prose), data))
    ]
    questions = [
        _question(model, length, i, steps) for i, length in enumerate(lengths(count - len(prose)))
    ]
    # Interleaved, so that each part of a split has both kinds.
    every = max(_PROSE_EVERY, count // len(prose))
    for i, text in enumerate(prose):
        questions.insert(i * every, text)
    return questions


def _question(model: LoadedModel, length_tokens: int, index: int, steps: int) -> CalibrationText:
    assert model.tokenizer is not None
    task = sorted(TASKS)[index * _TASK_STRIDE % len(TASKS)]
    sample = make_sample(task, model.tokenizer, length_tokens, _FIRST_SEED + index)
    steps = min(steps, sample.max_new_tokens)
    return CalibrationText(task, sample.tokens, (), steps, 0, length_tokens)


def _prose(model: LoadedModel, lengths: Sequence[int], data: Path | None) -> list[list[int]]:
    assert model.tokenizer is not None
    found: list[list[int]] = []
    longest = max(lengths)
    for text in _standard_library() if data is None else _files(data):
        tokens = model.tokenizer.encode(text)
        for start in range(0, len(tokens) - longest + 1, longest):
            found.append(tokens[start : start + longest])
    if not found:
        raise ConfigError(
            f"expected text of at least {longest} tokens, got less; give more or longer files, or "
            "ask for shorter sequences"
        )
    # Spread over all there is.
    number = min(len(found), len(lengths))
    chosen = np.linspace(0, len(found) - 1, number).astype(int)
    return [found[i][:length] for i, length in zip(chosen, lengths[:number], strict=True)]


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
