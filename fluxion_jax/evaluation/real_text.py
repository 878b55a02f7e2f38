"""Real text: teacher-forced fidelity to full attention over several stretches."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fluxion_jax.attention import Execution
from fluxion_jax.bench.cells import cell, growing_cell
from fluxion_jax.cache.host_kv import HostKV
from fluxion_jax.errors import ConfigError
from fluxion_jax.evaluation.branches import run_branches
from fluxion_jax.evaluation.fingerprints import digest, policy_fingerprint
from fluxion_jax.fidelity import divergence
from fluxion_jax.generation import Scores, prefill, score
from fluxion_jax.models.load import LoadedModel
from fluxion_jax.policy.protocol import Policy, needs_sketch
from fluxion_jax.session import cache_dtype

# Multiples of the golden ratio spread evenly over the unit interval, however many there are.
_GOLDEN = 0.6180339887498949


def spread(index: int) -> float:
    """The place of the `index`-th of any number of evenly spread places, 0 to 1."""
    return (0.5 + index * _GOLDEN) % 1.0


def stretches(
    tokens: Sequence[int], length_tokens: int, indices: Sequence[int]
) -> list[tuple[int, ...]]:
    """Stretches of a text, spread over it; they may overlap.

    Args:
      tokens: of the whole text.
      length_tokens: of each stretch.
      indices: which of the endless sequence of stretches.

    Raises:
      ConfigError: the text is too short.
    """
    free = len(tokens) - length_tokens
    if free < 0:
        raise ConfigError(
            f"expected a length of at most {len(tokens)} tokens for this text, got "
            f"{length_tokens}; ask for less, or give a longer text"
        )
    starts = [int(spread(i) * (free + 1)) for i in indices]
    return [tuple(tokens[start : start + length_tokens]) for start in starts]


def compare(
    model: LoadedModel,
    fingerprint: str,
    texts: Sequence[Sequence[int]],
    scored_tokens: int,
    policies: Sequence[Policy],
    folder: Path | None,
    execution: Execution,
    progress: bool | None,
) -> list[dict[str, Any]]:
    """Teacher-forces the end of each text through decode steps under each policy.

    Args:
      model: loaded.
      fingerprint: of the model.
      texts: token ids, as many in each.
      scored_tokens: tokens of each text that are scored.
      policies: the first is the reference.
      folder: where finished cells are kept; None keeps none.
      execution: how a step runs; every step is measured as well.
      progress: show progress bars; None shows them on a terminal and in a notebook.

    Returns:
      Per policy `policy`, `host_bytes_per_token`, `read_fraction`, `recall` and `output_error` per
      layer, and lists with an entry per text: `log_perplexity` (mean negative log-probability),
      `kl` (nats) and `agreement` (share of equal most likely tokens), both against the reference.
    """
    given = np.asarray(texts, np.int32)
    execution = Execution(
        execution.host, execution.device, execution.dense_below_tokens, measure=True
    )

    @functools.cache
    def prefilled() -> HostKV:
        layout = model.config.kv_layout(
            cache_dtype(model.model), sketch=any(map(needs_sketch, policies))
        )
        cache = HostKV.allocate(layout, len(given), given.shape[1])
        prefill(model, given[:, : -scored_tokens - 1], cache, progress=progress)
        return cache

    def scored(policy: Policy) -> Scores:
        continuation = given[:, -scored_tokens - 1 :]
        return score(
            model,
            prefilled().fork(),
            continuation,
            policy=policy,
            execution=execution,
            progress=progress,
        )

    reference = functools.cache(lambda: scored(policies[0]))

    def measure(policy: Policy) -> dict[str, Any]:
        scores = reference() if policy is policies[0] else scored(policy)
        stats = scores.stats
        assert stats.recall is not None
        assert stats.output_error is not None
        return {
            "policy": str(policy),
            "host_bytes_per_token": stats.host_bytes_per_token,
            "read_fraction": stats.read_fraction,
            "recall": stats.recall.tolist(),
            "output_error": stats.output_error.tolist(),
            "log_perplexity": (-scores.log_probs.mean(axis=1, dtype=np.float64)).tolist(),
            "kl": divergence(reference(), scores).mean(axis=1).tolist(),
            "agreement": (scores.likeliest == reference().likeliest).mean(axis=1).tolist(),
        }

    common = digest(
        model=fingerprint,
        execution=repr(execution),
        texts=given.tolist(),
        scored_tokens=scored_tokens,
        reference=policy_fingerprint(policies[0]),
    )
    return [
        cell(
            folder,
            digest(text=common, policy=policy_fingerprint(policy)),
            functools.partial(measure, policy),
        )
        for policy in policies
    ]


def compare_together(
    model: LoadedModel,
    fingerprint: str,
    texts: Sequence[Sequence[int]],
    scored_tokens: int,
    policies: Sequence[Policy],
    folder: Path | None,
    execution: Execution,
) -> list[dict[str, Any]]:
    """As `compare`, but all policies decode at once from one prefix on the device; see `branches`.

    Recall and output error are not measured, and are None. A batch is one cell of the folder;
    policies that it has already are not asked again.
    """
    given = np.asarray(texts, np.int32)
    common = digest(
        model=fingerprint,
        together=True,
        dense_below_tokens=execution.dense_below_tokens,
        texts=given.tolist(),
        scored_tokens=scored_tokens,
        reference=policy_fingerprint(policies[0]),
    )

    def measure(missing: list[int]) -> list[dict[str, Any]]:
        asked = [policies[0], *(policies[v] for v in missing if v)]
        run = run_branches(
            model.model,
            given[:, :-scored_tokens].tolist(),
            asked,
            max_new_tokens=scored_tokens,
            stop_tokens=(),
            layout=model.config.kv_layout(
                cache_dtype(model.model), sketch=any(map(needs_sketch, asked))
            ),
            dense_below_tokens=execution.dense_below_tokens,
            capacity_tokens=given.shape[1],
            forced=given[:, -scored_tokens:],
        )
        assert run.fidelity is not None
        log_probs, kl, likeliest = (np.asarray(x) for x in run.fidelity)
        found = [
            {
                "policy": str(policy),
                "host_bytes_per_token": float(run.host_bytes_per_token[v]),
                "read_fraction": float(run.read_fraction[v]),
                "recall": None,
                "output_error": None,
                "log_perplexity": (-log_probs[:, v].mean(axis=1, dtype=np.float64)).tolist(),
                "kl": kl[:, v].mean(axis=1, dtype=np.float64).tolist(),
                "agreement": (likeliest[:, v] == likeliest[:, 0]).mean(axis=1).tolist(),
            }
            for v, policy in enumerate(asked)
        ]
        return found if missing[0] == 0 else found[1:]

    names = [policy_fingerprint(policy) for policy in policies]
    return growing_cell(folder, common, names, measure)
