"""Real text of the installed Python packages, and a tokenizer trained on it."""

from __future__ import annotations

import hashlib
import os
import random
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from fluxion_jax.evaluation.words import essay_sentences, names, noise_lines, plain_words

END = "<|endoftext|>"
END_ID = 0
_SUFFIXES = (".py", ".md", ".rst", ".txt")
_MIN_BYTES, _MAX_BYTES = 500, 300_000
_HELD_OUT_OF = 50
_TASK_NAMES, _TASK_REPEATS = 4000, 6


class Corpus(NamedTuple):
    """Documents of the splits, as text; `held_out_sources` has nothing in common with `train`."""

    train: list[str]
    held_out: list[str]
    held_out_sources: list[str]


def _roots() -> list[Path]:
    paths = sysconfig.get_paths()
    return [Path(paths[name]) for name in ("stdlib", "purelib", "platlib")]


def _files(roots: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    seen = set()
    for root in roots:
        for folder, inner, files in os.walk(root):
            # Site-packages may lie inside the standard library: walked as a root of its own.
            inner[:] = [
                d for d in inner if d not in ("__pycache__", "site-packages", "dist-packages")
            ]
            for file in files:
                path = Path(folder, file)
                if file.endswith(_SUFFIXES) and path not in seen:
                    seen.add(path)
                    yield path.relative_to(root).as_posix(), path


def read_corpus(max_bytes: int, roots: Sequence[Path] | None = None) -> Corpus:
    """Reads files in the order of their path's hash; one in 50, by that hash, is held out.

    Args:
      max_bytes: of text in all.
      roots: folders to walk; None takes the standard library and the installed packages.
    """
    keyed = sorted(
        (hashlib.sha256(name.encode()).digest(), path) for name, path in _files(roots or _roots())
    )
    corpus, contents, total = Corpus([], [], []), set(), 0
    for key, path in keyed:
        try:
            if not _MIN_BYTES <= path.stat().st_size <= _MAX_BYTES:
                continue
            raw = path.read_bytes()
            text = raw.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        # Vendored copies would bring held-out files into training.
        digest = hashlib.sha256(raw).digest()
        if digest in contents or END in text:
            continue
        contents.add(digest)
        split = corpus.held_out if int.from_bytes(key[:8]) % _HELD_OUT_OF == 0 else corpus.train
        split.append(text)
        total += len(raw)
        if total >= max_bytes:
            break
    return corpus


def _task_words() -> list[str]:
    """The tasks' words and phrases, often enough that prompts take few tokens."""
    rng = random.Random(0)
    words = []
    for _ in range(_TASK_REPEATS):
        called = names(rng, _TASK_NAMES)
        words += [f"One of the special magic numbers for {name} is: 1." for name in called]
        words += [f"def {name.replace('-', '_')}(x):" for name in called]
        words.append(" ".join(plain_words(rng, 4 * _TASK_NAMES)))
    return [*noise_lines(300), *essay_sentences(2000), *words]


def train_tokenizer(texts: Sequence[str], vocab_size: int, max_bytes: int) -> Any:
    """Trains a byte-level BPE whose digits are tokens of their own."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    chosen, total = _task_words(), 0
    for text in texts:
        chosen.append(text)
        total += len(text)
        if total >= max_bytes:
            break
    tokenizer.train_from_iterator(chosen, trainer)
    return tokenizer


def encode_documents(tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    """uint16 `[N]`: all documents, each followed by the end token."""
    parts = []
    for first in range(0, len(texts), 256):
        for encoding in tokenizer.encode_batch_fast(list(texts[first : first + 256])):
            parts.append(np.asarray([*encoding.ids, END_ID], np.uint16))
    return np.concatenate(parts) if parts else np.zeros(0, np.uint16)
