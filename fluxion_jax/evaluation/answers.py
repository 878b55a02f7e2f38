"""Answers of a batch of samples under several policies, from one prefill."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fluxion_jax.attention import Execution
from fluxion_jax.bench.cells import cell, growing_cell
from fluxion_jax.cache.host_kv import HostKV
from fluxion_jax.evaluation.branches import run_branches
from fluxion_jax.evaluation.fingerprints import digest, policy_fingerprint
from fluxion_jax.evaluation.metrics import METRICS
from fluxion_jax.evaluation.samples import Sample
from fluxion_jax.generation import generate, prefill
from fluxion_jax.models.load import LoadedModel
from fluxion_jax.policy.protocol import Policy, needs_sketch
from fluxion_jax.session import cache_dtype

_CAPACITY_TOKENS = 4096


def answer(
    model: LoadedModel,
    fingerprint: str,
    samples: Sequence[Sample],
    policies: Sequence[Policy],
    folder: Path | None,
    execution: Execution,
    progress: bool | None,
) -> list[dict[str, Any]]:
    """Answers the samples under each policy and scores the answers.

    Args:
      model: with a tokenizer.
      fingerprint: of the model.
      samples: a batch of one task and length.
      policies: the first is the reference of `same_prefix`.
      folder: where finished cells are kept; None keeps none.
      execution: how a step runs.
      progress: show progress bars; None shows them on a terminal and in a notebook.

    Returns:
      Per policy `policy`, `host_bytes_per_token`, `read_fraction`, and lists with an entry per
      sample: `tokens`, `text`, `score` (0 to 1), and `same_prefix`, the share of the reference's
      tokens before the first that differs.
    """
    capacity = _capacity(samples)

    @functools.cache
    def prefilled() -> HostKV:
        layout = model.config.kv_layout(
            cache_dtype(model.model), sketch=any(map(needs_sketch, policies))
        )
        cache = HostKV.allocate(layout, len(samples), capacity)
        prefill(model, [list(s.tokens[:-1]) for s in samples], cache, progress=progress)
        return cache

    def measure(policy: Policy) -> dict[str, Any]:
        result = generate(
            model,
            [[sample.tokens[-1]] for sample in samples],
            policy=policy,
            max_new_tokens=samples[0].max_new_tokens,
            cache=prefilled().fork(),
            execution=execution,
            progress=progress,
        )
        tokens = [row.tolist() for row in result.tokens]
        return {
            "policy": str(policy),
            "host_bytes_per_token": result.stats.host_bytes_per_token,
            "read_fraction": result.stats.read_fraction,
            "tokens": tokens,
            "text": _texts(model, tokens),
        }

    common = digest(
        model=fingerprint,
        execution=repr(execution),
        prompts=[sample.tokens for sample in samples],
        capacity=capacity,
        max_new_tokens=samples[0].max_new_tokens,
    )
    found = []
    for policy in policies:
        name = digest(batch=common, policy=policy_fingerprint(policy))
        found.append(cell(folder, name, functools.partial(measure, policy)))
    return _scored(found, samples)


def answer_together(
    model: LoadedModel,
    fingerprint: str,
    samples: Sequence[Sample],
    policies: Sequence[Policy],
    folder: Path | None,
    execution: Execution,
) -> list[dict[str, Any]]:
    """As `answer`, but all policies decode at once from one prefix on the device; see `branches`.

    A batch is one cell of the folder; policies that it has already are not asked again.
    """
    capacity = _capacity(samples)
    common = digest(
        model=fingerprint,
        together=True,
        dense_below_tokens=execution.dense_below_tokens,
        prompts=[sample.tokens for sample in samples],
        capacity=capacity,
        max_new_tokens=samples[0].max_new_tokens,
    )

    def measure(missing: list[int]) -> list[dict[str, Any]]:
        asked = [policies[v] for v in missing]
        run = run_branches(
            model.model,
            [sample.tokens for sample in samples],
            asked,
            max_new_tokens=samples[0].max_new_tokens,
            stop_tokens=model.tokenizer.eos_ids if model.tokenizer else (),
            layout=model.config.kv_layout(
                cache_dtype(model.model), sketch=any(map(needs_sketch, asked))
            ),
            dense_below_tokens=execution.dense_below_tokens,
            capacity_tokens=capacity,
        )
        return [
            {
                "policy": str(policy),
                "host_bytes_per_token": float(run.host_bytes_per_token[v]),
                "read_fraction": float(run.read_fraction[v]),
                "tokens": run.tokens[v],
                "text": _texts(model, run.tokens[v]),
            }
            for v, policy in enumerate(asked)
        ]

    names = [policy_fingerprint(policy) for policy in policies]
    return _scored(growing_cell(folder, common, names, measure), samples)


def _capacity(samples: Sequence[Sample]) -> int:
    needed = max(len(sample.tokens) + sample.max_new_tokens for sample in samples)
    return cache_capacity(needed, samples[0].length_tokens)


def cache_capacity(needed_tokens: int, length_tokens: int) -> int:
    """Tokens of a cache: few different ones, so that batches share programs, none far too large.

    Args:
      needed_tokens: of prompt and answer.
      length_tokens: that were asked for.
    """
    return min(length_tokens, -(-needed_tokens // _CAPACITY_TOKENS) * _CAPACITY_TOKENS)


def _texts(model: LoadedModel, tokens: Sequence[Sequence[int]]) -> list[str]:
    assert model.tokenizer is not None
    return [model.tokenizer.decode(row) for row in tokens]


def _scored(found: list[dict[str, Any]], samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Scored afresh, so that what is kept does not depend on the metrics."""
    for kept in found:
        kept["score"] = [
            METRICS[s.metric](text, s.references)
            for s, text in zip(samples, kept["text"], strict=True)
        ]
        pairs = zip(found[0]["tokens"], kept["tokens"], strict=True)
        kept["same_prefix"] = [_same_prefix(r, t) for r, t in pairs]
    return found


def _same_prefix(reference: Sequence[int], tokens: Sequence[int]) -> float:
    if not reference:
        return 1.0
    count = min(len(reference), len(tokens))
    differs = np.flatnonzero(np.not_equal(reference[:count], tokens[:count]))
    return float(differs[0] if differs.size else count) / len(reference)
