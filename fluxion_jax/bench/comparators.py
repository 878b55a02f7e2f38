"""The host's attention and scoring by NumPy, JAX and, where it is installed, PyTorch.

Before every repetition the caches are driven out, as they are before ours.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fluxion_jax.bench.statistics import summarise

# Comparators of attention with this in their name read what ours reads, where it lies; the others
# are given copies of the selected blocks that cost them nothing.
GATHER = "with gather"


def attention_times_s(
    q: Any, k: Any, v: Any, ids: Any, scale: float, repetitions: int, cool: Callable[[], Any]
) -> dict[str, Any]:
    """Seconds of attention to selected blocks, by comparator, as `summarise` gives them.

    Args:
      q: float32 `[K, G, H]`.
      k: bfloat16 `[K, P, 16, H]`.
      v: likewise.
      ids: int32 `[K, M]`, the selected blocks.
      scale: factor of the scores.
      repetitions: of each.
      cool: called before each repetition, drives the inputs out of the caches.
    """
    ids = np.asarray(ids)
    heads = np.arange(len(ids))[:, None]
    flat = (len(ids), -1, k.shape[-1])
    k, v = (jax.device_put(x, jax.memory.Space.Device) for x in (k, v))
    whole = np.asarray(k), np.asarray(v)

    def gathered() -> list[Any]:
        return [x[heads, ids].reshape(flat) for x in whole]

    def numpy_with_gather() -> Any:
        kg, vg = (x.astype(np.float32) for x in gathered())
        return _numpy(q, np.swapaxes(kg, 1, 2), vg, scale)

    kg, vg = gathered()
    kf, vf = kg.astype(np.float32), vg.astype(np.float32)
    by_channel = np.ascontiguousarray(np.swapaxes(kf, 1, 2))
    kj, vj, qj, ij = (jnp.asarray(x) for x in (kg, vg, q, ids))
    todo: dict[str, Callable[[], Any]] = {
        f"numpy {GATHER}": numpy_with_gather,
        f"jax {GATHER}": lambda: jax.block_until_ready(_jax_gather(qj, k, v, ij, scale)),
        "numpy, tokens by channels": lambda: _numpy(q, np.swapaxes(kf, 1, 2), vf, scale),
        "numpy, channels by tokens": lambda: _numpy(q, by_channel, vf, scale),
        "jax": lambda: jax.block_until_ready(_jax(qj, kj, vj, scale)),
    }
    if importlib.util.find_spec("torch"):
        _add_torch(todo, q, whole, (kg, vg), ids, scale)
    return {name: summarise(_timed(run, repetitions, cool)) for name, run in todo.items()}


def scoring_times_s(
    q8: Any, summaries: Any, repetitions: int, cool: Callable[[], Any]
) -> dict[str, Any]:
    """Seconds of scoring all units, by comparator, as `summarise` gives them.

    NumPy and PyTorch multiply float32 copies of the summaries, made beforehand; JAX reads the int8
    summaries themselves.

    Args:
      q8: int8 `[K, G, H]`.
      summaries: int8 `[K, U, 2, H]`, low then high.
      repetitions: of each.
      cool: called before each repetition, drives the inputs out of the caches.
    """
    q = np.asarray(q8, np.float32)
    positive, negative = np.maximum(q, 0), np.minimum(q, 0)
    rows = np.asarray(summaries)
    low, high = (np.ascontiguousarray(rows[:, :, i], np.float32) for i in (0, 1))
    qj, sj = jnp.asarray(q8), jax.device_put(summaries, jax.memory.Space.Device)
    todo: dict[str, Callable[[], Any]] = {
        "numpy float32": lambda: (
            positive @ np.swapaxes(high, 1, 2) + negative @ np.swapaxes(low, 1, 2)
        ),
        "jax int8": lambda: jax.block_until_ready(_jax_scores(qj, sj, jnp.int32)),
        "jax float32": lambda: jax.block_until_ready(_jax_scores(qj, sj, jnp.float32)),
    }
    if importlib.util.find_spec("torch"):
        torch = importlib.import_module("torch")
        p, n, lo, hi = (torch.from_numpy(x) for x in (positive, negative, low, high))
        todo["torch float32"] = lambda: p @ hi.transpose(1, 2) + n @ lo.transpose(1, 2)
    return {name: summarise(_timed(run, repetitions, cool)) for name, run in todo.items()}


def _timed(run: Callable[[], Any], repetitions: int, cool: Callable[[], Any]) -> list[float]:
    run()
    taken = []
    for _ in range(repetitions):
        cool()
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return taken


@partial(jax.jit, static_argnums=2)
def _jax_scores(q: Any, summaries: Any, dtype: Any) -> Any:
    low, high = (summaries[:, :, i].astype(dtype) for i in (0, 1))
    q = q.astype(dtype)
    upper = jnp.einsum("kgh,kuh->kgu", jnp.maximum(q, 0), high)
    return upper + jnp.einsum("kgh,kuh->kgu", jnp.minimum(q, 0), low)


def _numpy(q: Any, k: Any, v: Any, scale: float) -> Any:
    scores = q @ k * np.float32(scale)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v


@jax.jit
def _jax(q: Any, k: Any, v: Any, scale: Any) -> Any:
    scores = jnp.einsum("kgh,ksh->kgs", q.astype(k.dtype), k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * scale, axis=-1).astype(v.dtype)
    return jnp.einsum("kgs,ksh->kgh", weights, v, preferred_element_type=jnp.float32)


@jax.jit
def _jax_gather(q: Any, k: Any, v: Any, ids: Any, scale: Any) -> Any:
    rows = jnp.arange(len(ids))[:, None]
    kg, vg = (x[rows, ids].reshape(len(ids), -1, x.shape[-1]) for x in (k, v))
    return _jax(q, kg, vg, scale)


def _add_torch(todo: Any, q: Any, whole: Any, gathered: Any, ids: Any, scale: float) -> None:
    torch = importlib.import_module("torch")

    def tensor(x: Any) -> Any:
        return torch.from_numpy(np.array(x).view(np.int16)).view(torch.bfloat16)

    kt, vt = (tensor(x)[None] for x in gathered)
    qt = torch.from_numpy(np.array(q)).to(torch.bfloat16)[None]
    attend = torch.nn.functional.scaled_dot_product_attention
    todo["torch"] = lambda: attend(qt, kt, vt, scale=scale, enable_gqa=False)
    kw, vw = (tensor(x) for x in whole)
    index, rows = torch.from_numpy(np.array(ids)).long(), torch.arange(len(ids))[:, None]

    def with_gather() -> Any:
        kg, vg = (x[rows, index].reshape(1, len(ids), -1, x.shape[-1]) for x in (kw, vw))
        return attend(qt, kg, vg, scale=scale)

    todo[f"torch {GATHER}"] = with_gather
