"""Training sequences: text windows, copying and drills, made by background processes."""

from __future__ import annotations

import math
import multiprocessing
import os
import queue
import random
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from recall_model import drills
from recall_model.drills import Drill
from recall_model.text import END_ID

NO_LOSS, TEXT, ANSWER = 0, 1, 2
# Shares of the kinds of sequences: while induction forms, and afterwards.
_SHORT_TOKENS = 512
_SHORT_MIX = {"copy": 35, "niah": 35, "dense": 10, "vt": 10, "text": 10}
_LONG_MIX = {
    "text": 15, "copy": 4, "niah": 30, "dense": 9, "vt": 15, "key_value": 6, "cwe": 6, "fwe": 7,
    "code_completion": 6, "passkey": 2,
}  # fmt: skip
_MAX_TURNS = 24
_MAX_COPIED_TOKENS = 128
_MIN_FILL = 0.85
_MAX_TRIES = 50
_FULL_LENGTH_SHARE = 0.7
# A share of the long sequences holds several drills, so that short prompts are not forgotten.
_PACKED_TOKENS, _PACKED_SHARE, _MIN_PACKED_TOKENS = 2048, 0.3, 512
# The evaluation shows an example in front of the chains, too long for the shortest sequences.
_EXAMPLE_TOKENS = 1024


class Data(NamedTuple):
    """What sequences are made of: a tokenizer, training text as ids and as documents."""

    tokenizer: Any
    ids: np.ndarray
    texts: list[str]


class Rows:
    """Makes sequences of a length; one object per process, as it learns sizes that fit."""

    def __init__(self, data: Data) -> None:
        self._data = data
        self._rates: dict[str, float] = {}

    def batch(self, seed: str, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Sequences of one step.

        Returns:
          uint16 `[rows, length]` tokens and uint8 kinds: what kind of loss each token has as a
          target.
        """
        made = [self.row(random.Random(f"recall:{seed}:{i}"), length) for i in range(rows)]
        tokens, kinds = zip(*made, strict=True)
        return np.stack(tokens), np.stack(kinds)

    def row(self, rng: random.Random, length: int) -> tuple[np.ndarray, np.ndarray]:
        """One sequence: text, copying, or a drill with text behind or before it."""
        mix = _SHORT_MIX if length <= _SHORT_TOKENS else _LONG_MIX
        (kind,) = rng.choices(list(mix), list(mix.values()))
        if kind == "text":
            return self._text(rng, length), np.full(length, TEXT, np.uint8)
        if kind == "copy":
            return self._copy(rng, length)
        drills_mix = {name: share for name, share in mix.items() if name not in ("text", "copy")}
        packed = length >= _PACKED_TOKENS and rng.random() < _PACKED_SHARE
        made, rest = [], length
        while rest == length or (packed and rest >= _MIN_PACKED_TOKENS):
            made.append(self._fitting(rng, kind, self._room(rng, rest, length, packed), rest))
            rest -= len(made[-1][0])
            (kind,) = rng.choices(list(drills_mix), list(drills_mix.values()))
        filler = self._text(rng, rest), np.full(rest, TEXT, np.uint8)
        made.insert(len(made) if rng.random() < 0.8 else 0, filler)
        return np.concatenate([t for t, _ in made]), np.concatenate([k for _, k in made])

    def _room(self, rng: random.Random, rest: int, length: int, packed: bool) -> int:
        """Tokens that the next drill of a sequence may have."""
        if packed:
            return min(rest, rng.randint(_MIN_PACKED_TOKENS, length // 2))
        if rng.random() < _FULL_LENGTH_SHARE:
            return length
        return max(min(length, 256), int(length * rng.uniform(0.3, 1.0)))

    def _fitting(
        self, rng: random.Random, kind: str, room: int, most: int
    ) -> tuple[np.ndarray, np.ndarray]:
        for _ in range(_MAX_TRIES):
            made = self.drill(rng, kind, room)
            if made is not None:
                return made
            kind, room = "niah", most
        raise ValueError(f"expected a drill that fits {most} tokens, got none; ask for more")

    def drill(
        self, rng: random.Random, kind: str, room: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """A drill of nearly `room` tokens, or None where even the smallest is too long."""
        name, build = self._builder(rng, kind, room)
        seed = rng.getrandbits(64)
        rate = self._rates.get(name, 0.02)
        size, best = max(1, int(rate * room)), None
        tried: set[int] = set()
        while size not in tried and len(tried) < 8:
            tried.add(size)
            encoded = self._encode(build(random.Random(seed), size))
            count = len(encoded[0])
            if count <= room:
                if best is None or count > len(best[0]):
                    best, self._rates[name] = encoded, size / room
                if count >= _MIN_FILL * room:
                    break
                size = max(size + 1, int(size * min(8.0, 0.96 * room / count)))
            else:
                size = max(1, int(size * 0.96 * room / count))
        return best

    def _builder(
        self, rng: random.Random, kind: str, room: int
    ) -> tuple[str, Callable[[random.Random, int], Drill]]:
        if kind in ("niah", "dense"):
            return self._needles(rng, kind, room)
        turns = 2 if room <= _SHORT_TOKENS else rng.randint(1, 12)
        if kind == "vt":
            example = room >= _EXAMPLE_TOKENS
            plain = example and rng.random() < 0.5
            count = 1 if plain or room <= _SHORT_TOKENS else rng.randint(1, 6 if room > 2048 else 2)
            hops = 4 if example else rng.randint(1, 4)

            def variables(rng: random.Random, size: int) -> Drill:
                return drills.chains(rng, size, turns, num_chains=count, hops=hops, example=example)

            return f"vt{count}{example}", variables

        def of_evaluation(rng: random.Random, size: int) -> Drill:
            return drills.evaluation_drill(rng, size, turns, task=kind, room_tokens=room)

        return kind, of_evaluation

    def _needles(
        self, rng: random.Random, kind: str, room: int
    ) -> tuple[str, Callable[[random.Random, int], Drill]]:
        short = room <= _SHORT_TOKENS
        hay = None if kind == "dense" else rng.choice(("noise", "essay", "essay", "text"))
        key = "uuid" if rng.random() < (0.4 if hay is None else 0.05) else "word"
        value = key if hay is None and rng.random() < 0.8 else None
        value = value or ("uuid" if rng.random() < 0.2 else "number")
        value = "number" if value == "word" else value
        most = max(1, room // (64 if value == key == "number" else 96))
        num_keys = min(200, int(math.exp(rng.uniform(0, math.log(most + 1)))))
        num_values = num_queries = 1
        form = rng.random()
        if hay is not None and not short:
            # Several values of a key are the hardest to learn, and take several keys to see often.
            if form < 0.4:
                num_values, num_keys = rng.choice((2, 3, 4, 4, 4, 4)), rng.choice((1, 1, 2, 4, 8))
                num_keys = min(num_keys, most)
            elif form < 0.55:
                num_queries = rng.choice((2, 3, 4, 4, 4))
                num_keys = max(num_queries, num_keys)
            elif form < 0.7:
                num_keys = rng.choice((1, 4))
        if hay is None:
            num_keys = 1
        turns = 2 if short else rng.randint(1, _MAX_TURNS)
        if value == "uuid" or key == "uuid":
            turns = 1 if short else min(turns, max(1, room // 400))
        turns = min(turns, max(1, room // 160) if not short else 2)
        texts = self._data.texts

        def build(rng: random.Random, size: int) -> Drill:
            pieces, separator = (None, "\n")
            if hay is not None:
                pieces, separator = drills.hay_of(rng, hay, size, texts)
            return drills.needles(
                rng, size, turns, hay=pieces, separator=separator, key=key, value=value,
                num_keys=num_keys, num_values=num_values, num_queries=num_queries,
            )  # fmt: skip

        return f"{hay}{key}{value}", build

    def _encode(self, drill: Drill) -> tuple[np.ndarray, np.ndarray]:
        (question, answer), *others = drill.turns
        parts = [drill.context + question, answer]
        for q, a in others:
            parts += [f"\n{q}", a]
        ids: list[int] = []
        spans = []
        for i, part in enumerate(parts):
            begin = len(ids)
            ids += self._data.tokenizer.encode(part, add_special_tokens=False).ids
            if i % 2:
                ids.append(END_ID)
                spans.append((begin, len(ids)))
        kinds = np.zeros(len(ids), np.uint8)
        for begin, end in spans:
            kinds[begin:end] = ANSWER
        return np.asarray(ids, np.uint16), kinds

    def _text(self, rng: random.Random, length: int) -> np.ndarray:
        ids = self._data.ids
        begin = rng.randrange(len(ids) - length)
        return ids[begin : begin + length]

    def _copy(self, rng: random.Random, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Random tokens or text in which a stretch comes again and must be predicted."""
        noise = np.random.default_rng(rng.getrandbits(64))
        plain = rng.random() < 0.3
        vocab = self._data.tokenizer.get_vocab_size()
        tokens = self._text(rng, length) if plain else noise.integers(1, vocab, length)
        tokens = tokens.astype(np.uint16)
        kinds = np.zeros(length, np.uint8)
        size = rng.randint(8, min(_MAX_COPIED_TOKENS, length // 3))
        source = rng.randrange(length - 2 * size + 1)
        target = source + size
        copies = 0
        target += rng.randrange(length - size - target + 1)
        while target + size <= length and copies < 3:
            tokens[target : target + size] = tokens[source : source + size]
            kinds[target + 1 : target + size] = ANSWER
            target += size + rng.randrange(size)
            copies += 1
        return tokens, kinds


class Feed:
    """Background processes that keep batches of the current stage ready."""

    def __init__(self, data: Data, seed: str, shapes: Sequence[tuple[int, int]], workers: int):
        """Starts the processes; before anything has started JAX's devices, as they are forks."""
        context = multiprocessing.get_context("fork")
        self._stage = context.Value("i", 0)
        self._queue: Any = context.Queue(max(4, 3 * workers))
        self._processes = [
            context.Process(
                target=_work,
                args=(data, f"{seed}:{i}", shapes, self._stage, self._queue, os.getpid()),
                daemon=True,
            )
            for i in range(workers)
        ]
        for process in self._processes:
            process.start()

    def switch(self, stage: int) -> None:
        """Makes batches of another stage from now on."""
        self._stage.value = stage

    def batches(self, stage: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batches of a stage, for ever.

        Raises:
          RuntimeError: a process failed, or none has made a batch for two minutes.
        """
        while True:
            try:
                made_for, batch = self._queue.get(timeout=120)
            except queue.Empty:
                raise RuntimeError("expected a batch within 120 s, got none") from None
            if made_for < 0:
                raise RuntimeError(f"a data process failed:\n{batch}")
            if made_for == stage:
                yield batch

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.terminate()
        self._queue.cancel_join_thread()


def _work(
    data: Data, seed: str, shapes: Sequence[tuple[int, int]], stage: Any, out: Any, parent: int
) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        rows, step = Rows(data), 0
        while os.getppid() == parent:
            now = stage.value
            batch = rows.batch(f"{seed}:{now}:{step}", *shapes[now])
            step += 1
            while os.getppid() == parent and stage.value == now:
                try:
                    out.put((now, batch), timeout=1)
                    break
                except queue.Full:
                    continue
    except Exception:
        out.put((-1, traceback.format_exc()))
