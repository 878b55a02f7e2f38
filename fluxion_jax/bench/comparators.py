"""Attention on the same selected blocks by NumPy, JAX and, where it is installed, PyTorch.

Each is timed on blocks gathered beforehand; JAX and PyTorch also with the gathering.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fluxion_jax.bench.statistics import summarise


def times_s(q: Any, k: Any, v: Any, ids: Any, scale: float, repetitions: int) -> dict[str, Any]:
    """Seconds of each comparator, by name, as `summarise` gives them.

    Args:
      q: float32 `[K, G, H]`.
      k: bfloat16 `[K, P, 16, H]`.
      v: likewise.
      ids: int32 `[K, M]`, the selected blocks.
      scale: factor of the scores.
      repetitions: of each.
    """
    ids = np.asarray(ids)
    heads = np.arange(len(ids))[:, None]
    flat = (len(ids), -1, k.shape[-1])
    kg, vg = (np.asarray(x)[heads, ids].reshape(flat) for x in (k, v))
    todo: dict[str, Callable[[], Any]] = {}
    kf, vf = kg.astype(np.float32), vg.astype(np.float32)
    by_channel = np.ascontiguousarray(np.swapaxes(kf, 1, 2))
    todo["numpy, tokens by channels"] = lambda: _numpy(q, np.swapaxes(kf, 1, 2), vf, scale)
    todo["numpy, channels by tokens"] = lambda: _numpy(q, by_channel, vf, scale)
    kj, vj, qj, ij = jnp.asarray(kg), jnp.asarray(vg), jnp.asarray(q), jnp.asarray(ids)
    todo["jax"] = lambda: jax.block_until_ready(_jax(qj, kj, vj, scale))
    todo["jax with gather"] = lambda: jax.block_until_ready(_jax_gather(qj, k, v, ij, scale))
    if importlib.util.find_spec("torch"):
        _add_torch(todo, q, (k, v), (kg, vg), ids, scale)
    return {name: summarise(_timed(run, repetitions)) for name, run in todo.items()}


def _timed(run: Callable[[], Any], repetitions: int) -> list[float]:
    run()
    taken = []
    for _ in range(repetitions):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return taken


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
    k, v = (jax.device_put(x, jax.memory.Space.Device) for x in (k, v))
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

    todo["torch with gather"] = with_gather
