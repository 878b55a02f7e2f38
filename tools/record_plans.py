"""Records what the heads of a real model need, for `fluxion bench policy` to replay.

    python tools/record_plans.py recall-12m --length 4096 8192 16384 --output FILE
    python tools/record_plans.py smollm2-135m --length 4096 6144 8192 --task real_text --output FILE

The needs are those of the labels that the policy fluxion is trained on: for each query head and
step the smallest budget, at each granularity, whose output error stays within the tolerance. With
--policy they are what a policy predicts whose weights were calibrated for the model:

    python tools/record_plans.py recall-12m --policy fluxion:tolerance=0.2 --output FILE

The steps of the longest length are kept whole, so that what heads need together is kept
too. For longer contexts a head's budgets grow by the power of the context that fits its mean
budgets at the recorded lengths by least squares of logarithms. How far the selections of a group
overlap is measured with the recorded budgets, and with those of fixed:16:0.05.

Axes: D granularities, L layers, T steps, N query heads, K KV heads, G = N // K, H head size.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import fluxion_jax as fx
from fluxion_jax.bench.capture import Captured
from fluxion_jax.bench.plan_sets import KEYS, cheapest, fit_growth
from fluxion_jax.bench.selection_quality import full_attention, select, unit_scores
from fluxion_jax.bench.stamp import stamp
from fluxion_jax.cache.host_kv import HostKV
from fluxion_jax.cache.layout import BLOCK_TOKENS, GRANULARITIES_TOKENS, host_tokens
from fluxion_jax.evaluation.fingerprints import model_fingerprint
from fluxion_jax.evaluation.heads import Study, _text
from fluxion_jax.evaluation.labels import label_layer
from fluxion_jax.generation import prefill
from fluxion_jax.models.load import LoadedModel, load_model
from fluxion_jax.policy import FluxionPolicy, parse_policy, parse_split

# Scores of so many queries at once: full attention of 16K tokens must not take gigabytes.
_QUERIES = 512
_FIXED_FRACTION = 0.05


def captured(model: Any, tokens: np.ndarray, positions: np.ndarray) -> Iterator[Captured]:
    """As `bench.capture.capture`, of long texts in little memory."""
    x = model._embed(jnp.asarray(np.pad(tokens, (0, -len(tokens) % _QUERIES)))[None])
    for layer in model.layers:
        x, q, k, v = _through(layer, x)
        k, v = (np.moveaxis(np.asarray(y[0], np.float32)[: len(tokens)], 1, 0) for y in (k, v))
        queries = np.asarray(q[0], np.float32)[positions]
        yield Captured(queries, k, v, layer.attention.scale)


@nnx.jit
def _through(layer: Any, x: jax.Array) -> tuple[jax.Array, ...]:
    length = x.shape[1]
    positions = jnp.arange(length, dtype=jnp.int32)
    q, k, v = layer.attention._project(layer.attention_norm(x), positions[None])
    group = q.shape[2] // k.shape[2]
    keys, values = (y[0].astype(jnp.float32) for y in (k, v))

    def attend(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        queries, at = part
        queries = queries.reshape(_QUERIES, keys.shape[1], group, -1).astype(jnp.float32)
        scores = jnp.einsum("tkgh,skh->kgts", queries, keys) * layer.attention.scale
        scores = jnp.where(positions <= at[:, None], scores, -jnp.inf)
        out = jnp.einsum("kgts,skh->tkgh", jax.nn.softmax(scores, axis=-1), values)
        return out.reshape(_QUERIES, -1)

    parts = (q[0].reshape(-1, _QUERIES, *q.shape[2:]), positions.reshape(-1, _QUERIES))
    out = jax.lax.map(attend, parts).reshape(1, length, -1)
    return layer.finish(x, layer.attention.o(out.astype(x.dtype))), q, k, v


def predicted(
    loaded: LoadedModel, tokens: list[int], first: int, steps: int, policy: FluxionPolicy
) -> np.ndarray:
    """Budgets `[T, L, N, D]` that a policy predicts for the steps from `first` on."""
    layout = loaded.config.kv_layout("float32", sketch=True)
    cache = HostKV.allocate(layout, 1, first + steps)
    prefill(loaded.model, tokens[:first], cache, progress=False)
    graph, params = nnx.split(loaded.model)
    held, found = host_tokens(layout, first), []
    for position in range(first, first + steps):
        token = jnp.asarray([tokens[position]], jnp.int32)
        cache, notes = _decode(graph, params, token, cache, policy)
        streams = np.asarray(notes.streaming_logit[:, 0]) > 0
        wanted = np.ceil(2.0 ** np.asarray(notes.log2_fraction[:, 0], np.float64) * held)
        found.append(np.where(streams[..., None], 0, np.clip(wanted, 1, held)).astype(np.int64))
    return np.stack(found)


@partial(fx.jit, static_argnames=("graph",))
def _decode(graph: Any, params: Any, token: Any, cache: Any, policy: Any) -> tuple[Any, Any]:
    model = nnx.merge(graph, params)
    _, cache, stats = model.decode_step(token, cache, policy, split=parse_split("host"))
    return cache, stats.notes


def needs(
    loaded: LoadedModel,
    tokens: list[int],
    first: int,
    steps: int,
    tolerance: float,
    policy: FluxionPolicy | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Budgets `[T, L, N, D]`, and tokens `[2, 2]`: union and largest head, recorded and fixed."""
    given = None if policy is None else predicted(loaded, tokens, first, steps, policy)
    layout = loaded.config.kv_layout("float32")
    host = slice(layout.sink_tokens, layout.sink_tokens + host_tokens(layout, first))
    held = host.stop - host.start
    positions = np.arange(first, first + steps)
    text = np.asarray(tokens[: first + steps], np.int32)
    budgets, read = [], np.zeros((2, 2), np.int64)
    for layer in captured(loaded.model, text, positions):
        if given is not None:
            budgets.append(given[:, len(budgets)])
        else:
            found = label_layer(layer, positions, host, (tolerance,))[0][0].astype(np.int64)
            budgets.append(np.moveaxis(found, 0, -1))
        attention = full_attention(layer, positions, host)
        best, chosen = cheapest(budgets[-1], np.asarray(held), layout)
        units = -(-chosen // np.repeat(np.asarray(GRANULARITIES_TOKENS)[best], _group(layer), 1))
        for d, granularity in enumerate(GRANULARITIES_TOKENS):
            scores = unit_scores("integer", layer, attention, host, granularity, shared=False)
            read[0] += _union(scores, np.where(best == d, 1, 0), units) * granularity
            if granularity == BLOCK_TOKENS:
                all_groups = np.ones_like(best)
                fixed = np.full_like(units, -(-_FIXED_FRACTION * first // granularity))
                read[1] += _union(scores, all_groups, fixed) * granularity
    return np.stack(budgets, axis=1), read


def _group(layer: Captured) -> int:
    return layer.q.shape[1] // len(layer.k)


def _union(scores: np.ndarray, taken: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Units of the union and of the largest head, over the groups taken: int64 `[2]`.

    Args:
      scores: `[K, T, G, U]`.
      taken: `[T, K]`.
      units: `[T, N]`.
    """
    kv_heads, steps, group, _ = scores.shape
    found = np.zeros(2, np.int64)
    for k in range(kv_heads):
        for t in range(steps):
            if not taken[t, k]:
                continue
            wanted = units[t, k * group : (k + 1) * group]
            masks = [select(scores[k, t, g], int(wanted[g])) for g in range(group)]
            found += np.any(masks, axis=0).sum(), max(mask.sum() for mask in masks)
    return found


def record(arguments: argparse.Namespace) -> dict[str, Any]:
    """The document; see `plan_sets.Recorded`."""
    loaded = load_model(arguments.model)
    config = loaded.config
    policy: Any = parse_policy(arguments.policy, loaded) if arguments.policy else None
    kept, recordings, read = {}, [], np.zeros((2, 2), np.int64)
    for length in sorted(arguments.length):
        study = Study(tuple(arguments.task), length, arguments.samples, arguments.steps)
        found = []
        for task in arguments.task:
            for i in range(arguments.samples):
                start = time.monotonic()
                tokens, first = _text(loaded, study, task, study.seed + i)
                budgets, tokens_read = needs(
                    loaded, list(tokens), first, arguments.steps, arguments.tolerance, policy
                )
                found.append(budgets)
                read += tokens_read
                took = time.monotonic() - start
                print(f"{length} {task} {i}: {took:.0f} s", file=sys.stderr, flush=True)
        kept[length] = np.concatenate(found)
        recordings.append(
            {
                "length_tokens": length,
                "steps": len(kept[length]),
                "streaming_fraction": float((kept[length][..., 0] == 0).mean()),
                "budget_fraction": (kept[length].mean(axis=(0, 1, 2)) / length).tolist(),
            }
        )
    longest = max(kept)
    fit = fit_growth({length: x.mean(axis=(0, 3)) for length, x in kept.items()})
    what = f"budgets that {policy} predicts for {loaded.name}"
    if policy is None:
        what = (
            f"smallest budgets of the heads of {loaded.name} whose output error is at most "
            f"{arguments.tolerance:g} of the step's largest head output"
        )
    document = {
        "description": f"{what}, of {', '.join(arguments.task)}; window of 64 + 256 tokens",
        "model": loaded.name,
        "model_sha256": model_fingerprint(loaded.model, config),
        "kv_heads": config.num_kv_heads,
        "granularities": list(GRANULARITIES_TOKENS),
        "recordings": recordings,
        "union_factor": float(read[0, 0] / max(read[0, 1], 1)),
        "fixed_union_factor": float(read[1, 0] / max(read[1, 1], 1)),
        "fit": fit,
        "length_tokens": longest,
        "budget_tokens": kept[longest].tolist(),
        "stamp": stamp(),
    }
    assert set(KEYS) <= set(document)
    return document


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--length", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--task", nargs="+", default=["niah_multikey_2", "vt", "real_text"])
    parser.add_argument("--samples", type=int, default=1, help="per task and length")
    parser.add_argument("--steps", type=int, default=8, help="of each sample")
    parser.add_argument("--tolerance", type=float, default=0.2)
    parser.add_argument("--policy", help="such as fluxion:tolerance=0.2, instead of labels")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    document = record(arguments)
    arguments.output.write_text(json.dumps(document, separators=(",", ":")) + "\n")
    shown = {k: v for k, v in document.items() if k not in ("budget_tokens", "stamp")}
    print(json.dumps(shown, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
