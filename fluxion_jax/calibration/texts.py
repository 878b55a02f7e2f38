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

from fluxion_jax.demo import DEMO_TOPICS
from fluxion_jax.errors import ConfigError
from fluxion_jax.evaluation.tasks import TASKS, make_sample
from fluxion_jax.models.load import LoadedModel

# A first position must be a multiple of a block, so that the host's tokens stay the same over the
# steps of a stretch.
_ALIGNMENT_TOKENS = 16
# Evaluations count from 0 and frozen protocols use larger seeds still.
_FIRST_SEED = 500_000
_MODULES = ("typing", "argparse", "inspect", "tarfile", "statistics", "difflib", "doctest", "ast")
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
      length_tokens: of each text.
      count: texts in all; without `data` every other one is a question.
      points: stretches of each text; a question has one more, where its answer begins.
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
    prose = _prose(model, length_tokens, count - num_questions, data)
    texts = [
        CalibrationText(
            f"text {i}", tokens, _positions(length_tokens, points, steps, shortest // 2)
        )
        for i, tokens in enumerate(prose)
    ]
    questions = [_question(model, length_tokens, i, points, steps) for i in range(num_questions)]
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
    task = sorted(TASKS)[index % len(TASKS)]
    sample = make_sample(task, model.tokenizer, length_tokens, _FIRST_SEED + index)
    prompt = list(sample.tokens)
    # The last token of the prompt is the first that a generation decodes.
    prompt = prompt[(len(prompt) - 1) % _ALIGNMENT_TOKENS :]
    answer = model.tokenizer.encode(" " + ", ".join(sample.references) + ".\n")
    answer = (answer * steps)[:steps]
    layout = model.config.kv_layout()
    first = layout.sink_tokens + layout.recent_tokens
    positions = _positions(len(prompt) - 2 * steps, max(points - 1, 1), steps, first)
    return CalibrationText(task, prompt + answer, [*positions, len(prompt) - 1])


def _prose(
    model: LoadedModel, length_tokens: int, count: int, data: Path | None
) -> list[list[int]]:
    assert model.tokenizer is not None
    found: list[list[int]] = []
    for text in _standard_library() if data is None else _files(data):
        tokens = model.tokenizer.encode(text)
        for start in range(0, len(tokens) - length_tokens + 1, length_tokens):
            found.append(tokens[start : start + length_tokens])
        if data is None and len(found) >= count:
            break
    if len(found) < count:
        raise ConfigError(
            f"expected text for {count} sequences of {length_tokens} tokens, got {len(found)}; "
            "give more or longer files, or ask for fewer or shorter sequences"
        )
    # Spread over all there is.
    return [found[i] for i in np.linspace(0, len(found) - 1, count).astype(int)]


def _standard_library() -> Iterator[str]:
    """Prose that the demo and the evaluation leave out, then source code."""
    topics = importlib.import_module("pydoc_data.topics").topics
    yield "\n\n".join(topics[name] for name in sorted(topics) if name not in DEMO_TOPICS)
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
