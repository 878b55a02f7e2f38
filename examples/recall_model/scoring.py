"""What a model has learned: exact answers to the evaluation's samples, and loss on real text."""

from __future__ import annotations

import multiprocessing
import os
import queue
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fluxion_jax.errors import ConfigError
from fluxion_jax.evaluation.samples import fit
from fluxion_jax.evaluation.tasks import TASKS
from recall_model.batches import ANSWER, NO_LOSS, TEXT
from recall_model.drills import answer_text

# Of the range for calibration and training; training draws from other generators.
FIRST_SEED = 900_000
_TEXT_WINDOWS = 256


class _Encoder:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def scored_row(tokenizer: Any, task: str, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A sample of the evaluation with its answer: tokens and kinds, both `[length]`."""
    encoder = _Encoder(tokenizer)
    sample = fit(TASKS[task], encoder, length, seed)
    answer = encoder.encode(answer_text(task, sample.prompt, sample.references))
    begin, end = len(sample.tokens), len(sample.tokens) + len(answer)
    tokens, kinds = np.zeros(length, np.uint16), np.full(length, NO_LOSS, np.uint8)
    tokens[:end] = [*sample.tokens, *answer][:length]
    kinds[begin:end] = ANSWER
    return tokens, kinds


def _make(tokenizer: Any, lengths: Sequence[int], samples: int, out: Any) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for length in lengths:
        for task in TASKS:
            try:
                rows = [scored_row(tokenizer, task, length, FIRST_SEED + i) for i in range(samples)]
            except ConfigError:
                # The task does not fit this length.
                rows = []
            out.put((length, task, rows))


class Examination:
    """Makes the samples in the background while the model trains."""

    def __init__(self, tokenizer: Any, lengths: Sequence[int], samples: int) -> None:
        """Starts the process; before anything has started JAX's devices, as it is a fork."""
        context = multiprocessing.get_context("fork")
        self._queue: Any = context.Queue()
        self._expected = len(lengths) * len(TASKS)
        self._lengths = lengths
        self._process = context.Process(
            target=_make, args=(tokenizer, lengths, samples, self._queue), daemon=True
        )
        self._process.start()

    def mark(
        self, score: Callable[..., Any], params: Any, batch_tokens: int
    ) -> dict[str, dict[str, Any]]:
        """Exact answers per length and task: `share` of `samples` whose whole answer is right."""
        made: dict[int, list[tuple[str, tuple[np.ndarray, np.ndarray]]]] = {}
        found: dict[str, dict[str, Any]] = {}
        for _ in range(self._expected):
            try:
                length, task, rows = self._queue.get(timeout=60)
            except queue.Empty:
                raise RuntimeError("expected samples within 60 s, got none") from None
            found.setdefault(str(length), {})[task] = {"samples": len(rows), "share": None}
            made.setdefault(length, []).extend((task, row) for row in rows)
        for length, entries in made.items():
            right = _in_batches(score, params, [row for _, row in entries], batch_tokens, length)[0]
            for task in {task for task, _ in entries}:
                own = [r for r, (t, _) in zip(right, entries, strict=True) if t == task]
                found[str(length)][task]["share"] = float(np.mean(own))
        return found

    def close(self) -> None:
        """Ends the process."""
        self._process.terminate()
        self._queue.cancel_join_thread()


def _in_batches(
    score: Callable[..., Any],
    params: Any,
    rows: Sequence[tuple[np.ndarray, np.ndarray]],
    batch_tokens: int,
    length: int,
) -> tuple[np.ndarray, np.ndarray]:
    size = max(1, batch_tokens // length)
    right, losses = [], []
    for first in range(0, len(rows), size):
        part = list(rows[first : first + size])
        # One shape, one program: the last batch is filled up with its own rows.
        padded = [part[i % len(part)] for i in range(size)]
        tokens, kinds = (np.stack(x) for x in zip(*padded, strict=True))
        r, loss = score(params, tokens, kinds)
        right.append(np.asarray(r)[: len(part)])
        losses.append(np.asarray(loss)[: len(part)])
    return np.concatenate(right), np.concatenate(losses)


def text_loss(
    score: Callable[..., Any], params: Any, ids: np.ndarray, length: int, batch_tokens: int
) -> dict[str, float]:
    """Loss in nats per token over evenly spaced windows of text: `mean`, `standard_error`."""
    starts = np.linspace(0, len(ids) - length, _TEXT_WINDOWS, dtype=np.int64)
    kinds = np.full(length, TEXT, np.uint8)
    rows = [(ids[s : s + length], kinds) for s in starts]
    losses = _in_batches(score, params, rows, batch_tokens, length)[1]
    return {
        "mean": float(np.mean(losses)),
        "standard_error": float(np.std(losses) / len(losses) ** 0.5),
    }
