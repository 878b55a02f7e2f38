"""Access to the golden data in this folder; `make_goldens.py` says how it was made."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
TINY = (
    "tiny_llama",
    "tiny_qwen2",
    "tiny_qwen3",
    "tiny_gemma3",
    "tiny_mistral",
    "tiny_qwen3_windows",
)
GREEDY = ("2k", "4k", "6k")


@dataclasses.dataclass(frozen=True)
class Greedy:
    """A prompt and its greedy continuation by SmolLM2-135M-Instruct in float32.

    Attributes:
      prompt: int32 `[S]`.
      tokens: int32 `[64]`; none of them ends the generation.
      margins: float32 `[64]`, best minus second-best logit at each token.
    """

    prompt: np.ndarray
    tokens: np.ndarray
    margins: np.ndarray


@dataclasses.dataclass(frozen=True)
class Logits:
    """Logits of a packaged model at some positions of a text.

    Attributes:
      tokens: int32 `[S]`.
      positions: int32 `[X]`.
      top_ids: int32 `[X, 64]`, the best ids, best first.
      top_logits: float32 `[X, 64]`.
      logsumexp: float32 `[X]`, over the whole vocabulary.
    """

    tokens: np.ndarray
    positions: np.ndarray
    top_ids: np.ndarray
    top_logits: np.ndarray
    logsumexp: np.ndarray


def greedy(name: str) -> Greedy:
    """One of `GREEDY`."""
    with np.load(HERE / "smollm2_135m_greedy.npz") as data:
        return Greedy(
            data[f"{name}_prompt"].astype(np.int32),
            data[f"{name}_tokens"].astype(np.int32),
            data[f"{name}_margins"],
        )


def logits(name: str) -> Logits:
    """Of "smollm2_135m" or "gemma3_270m"."""
    with np.load(HERE / f"{name}_logits.npz") as data:
        return Logits(
            data["tokens"].astype(np.int32),
            data["positions"],
            data["top_ids"].astype(np.int32),
            data["top_logits"],
            data["logsumexp"],
        )


def weight_sums(name: str) -> dict[str, list[float]]:
    """Sum and sum of magnitudes of every parameter, by its Hugging Face name."""
    return json.loads((HERE / f"{name}_weight_sums.json").read_text())


def encodings(name: str) -> list[tuple[str, list[int]]]:
    """Texts and their token ids without a start token."""
    cases = json.loads((HERE / f"{name}_encodings.json").read_text())
    return [(case["text"], case["ids"]) for case in cases]


def tiny(name: str) -> tuple[Path, np.ndarray, np.ndarray]:
    """Directory of a checkpoint, int32 tokens `[2, 70]` and float32 logits `[2, 70, 64]`."""
    with np.load(HERE / name / "logits.npz") as data:
        return HERE / name, data["tokens"].astype(np.int32), data["logits"]
