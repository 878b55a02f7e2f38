"""Fidelity: how far decoding under a policy departs from full attention on the same tokens.

Every policy starts from a fork of the same prefilled cache and is fed the same continuation, so
that differences come from the policy alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from fluxion_jax.attention import Execution
from fluxion_jax.cache.host_kv import HostKV
from fluxion_jax.generation import Scores, score
from fluxion_jax.policy.parse import parse_policy
from fluxion_jax.policy.protocol import Policy
from fluxion_jax.policy.split import Split


@dataclasses.dataclass
class PolicyReport:
    """What one policy did on a continuation.

    Attributes:
      policy: its name.
      num_tokens: tokens scored.
      perplexity: of the given continuation.
      agreement: share of steps whose most likely token is that of full attention; None for the
        reference itself.
      log_prob_difference: mean absolute difference of the given tokens' log-probabilities from the
        reference; None for the reference itself.
      host_bytes_per_token: bytes of the host cache read per token, K/V and summaries.
      read_fraction: share of the host cache's K/V that was read.
      recall: float `[L]`, mean share of the attention mass that was read, per global layer.
      output_error: float `[L]`, mean error of a head's output over the step's largest.
      kl: mean Kullback-Leibler divergence, in nats, of the next-token distribution from that of the
        reference; None for the reference itself.
    """

    policy: str
    num_tokens: int
    perplexity: float
    agreement: float | None
    log_prob_difference: float | None
    host_bytes_per_token: float
    read_fraction: float
    recall: list[float]
    output_error: list[float]
    kl: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        return dataclasses.asdict(self)


def compare_policies(
    model: Any,
    cache: HostKV,
    tokens: np.ndarray,
    policies: Sequence[str | Policy],
    *,
    split: str | float | Split | None = None,
    progress: bool | None = None,
) -> list[PolicyReport]:
    """Teacher-forces the same continuation under several policies.

    Args:
      model: see `generate`.
      cache: prefilled; it is forked and stays as it is.
      tokens: int `[B, S + 1]`; the first is fed, `S` are scored.
      policies: the first is the reference, usually `"full"`.
      split: see `generate`.
      progress: see `generate`.

    Returns:
      One report per policy, in order.
    """
    reports: list[PolicyReport] = []
    reference = None
    for policy in policies:
        scores = score(
            model,
            cache.fork(),
            tokens,
            policy=policy,
            split=split,
            execution=Execution(measure=True),
            progress=progress,
        )
        agreement = difference = kl = None
        if reference is None:
            reference = scores
        else:
            agreement = float((scores.likeliest == reference.likeliest).mean())
            difference = float(np.abs(scores.log_probs - reference.log_probs).mean())
            kl = float(divergence(reference, scores).mean())
        stats = scores.stats
        reports.append(
            PolicyReport(
                policy=str(parse_policy(policy, model)),
                num_tokens=int(scores.log_probs.size),
                perplexity=scores.perplexity,
                agreement=agreement,
                log_prob_difference=difference,
                host_bytes_per_token=stats.host_bytes_per_token,
                read_fraction=stats.read_fraction,
                recall=_as_list(stats.recall),
                output_error=_as_list(stats.output_error),
                kl=kl,
            )
        )
    return reports


def divergence(reference: Scores, scores: Scores) -> np.ndarray:
    """Kullback-Leibler divergence from the reference at each step, in nats: float64 `[B, S]`.

    Args:
      reference: measured scores, with distributions.
      scores: of the same tokens under another policy, measured too.
    """
    assert reference.distributions is not None
    assert scores.distributions is not None
    wanted, got = reference.distributions, scores.distributions
    # One row at a time: a vocabulary is large.
    rows = [
        (np.exp(w, dtype=np.float64) * (w - g)).sum(axis=-1)
        for w, g in zip(wanted, got, strict=True)
    ]
    return np.stack(rows)


def _as_list(values: np.ndarray | None) -> list[float]:
    return [] if values is None else [float(x) for x in values]
