"""Rating budgets against what heads needed, and the safety that keeps them from being too small.

A budget falls short if, in units of its granularity, it is below the smallest that keeps to the
tolerance; the under-budget rate counts all heads, steps and granularities, streaming or not. The
over-provisioning is the sum of the budgets given over the sum of those needed.

Axes: S samples, D granularities.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fluxion_jax.cache.layout import GRANULARITIES_TOKENS

Array = npt.NDArray[np.floating[Any]]

# Thresholds are tried at these quantiles of the logits; above all of them nothing streams.
_QUANTILES = np.concatenate([np.linspace(0.0, 0.98, 50), [1.0]])
_LEAST_MARGIN, _MOST_MARGIN = -4.0, 12.0
_BEYOND = 1e-3


class Rating(NamedTuple):
    """How budgets compare with what was needed.

    Attributes:
      accuracy: share of samples whose class, streaming or retrieval, is right.
      under_budget: share of samples and granularities whose budget is too small.
      missed: the same among those whose budget is not 0; a loose tolerance leaves few of them, and
        a rate over all heads would let them all be missed.
      over_provisioning: budgets given over budgets needed, sums.
      given_fraction: mean budget as a share of the host's tokens.
      needed_fraction: likewise of what was needed.
    """

    accuracy: float
    under_budget: float
    missed: float
    over_provisioning: float
    given_fraction: float
    needed_fraction: float


def in_tokens(log2_fraction: Array, host_tokens: npt.NDArray[np.int32]) -> Array:
    """Budgets `[S, D]` in tokens as the selector rounds and cuts them; 0 for `-inf`."""
    host = host_tokens[:, None].astype(np.float64)
    sizes = np.asarray(GRANULARITIES_TOKENS)
    tokens = np.minimum(np.exp2(log2_fraction.astype(np.float64)) * host, host)
    # log2 and back is not exact; a token is far more than the difference.
    return np.ceil((tokens - 1e-3) / sizes) * sizes


def rate(given: Array, needed: Array, host_tokens: npt.NDArray[np.int32]) -> Rating:
    """Rates budgets given as log2 of their share `[S, D]`, `-inf` for streaming."""
    given_tokens, needed_tokens = in_tokens(given, host_tokens), in_tokens(needed, host_tokens)
    host = host_tokens[:, None]
    return Rating(
        accuracy=float((np.isneginf(given[:, 0]) == np.isneginf(needed[:, 0])).mean()),
        under_budget=float((given_tokens < needed_tokens).mean()),
        missed=float((given_tokens < needed_tokens).sum() / max((needed_tokens > 0).sum(), 1)),
        over_provisioning=float(given_tokens.sum() / max(needed_tokens.sum(), 1.0)),
        given_fraction=float((given_tokens / host).mean()),
        needed_fraction=float((needed_tokens / host).mean()),
    )


def with_safety(logit: Array, log2_fraction: Array, threshold: float, margin: float) -> Array:
    """Budgets of predictions, as log2 of their share; `-inf` where a head streams."""
    return np.where((logit > threshold)[:, None], -np.inf, log2_fraction + margin)


def choose_safety(
    logit: Array,
    log2_fraction: Array,
    needed: Array,
    host_tokens: npt.NDArray[np.int32],
    target: float,
    missed: float,
) -> tuple[float, float]:
    """The threshold and margin that give the least and let few budgets fall short.

    Args:
      logit: float `[S]`, higher for streaming.
      log2_fraction: float `[S, D]`, predicted.
      needed: float `[S, D]`.
      host_tokens: int32 `[S]`.
      target: at most this share may fall short.
      missed: at most this share of the budgets that are not 0 may fall short.

    Returns:
      `(threshold, margin)`. If no margin suffices, nothing streams and the margin is largest.
    """
    needed_tokens = in_tokens(needed, host_tokens)
    sizes = np.asarray(GRANULARITIES_TOKENS)
    host = host_tokens[:, None].astype(np.float64)
    # A budget suffices as soon as it is beyond all but the last of the units that are needed.
    with np.errstate(divide="ignore"):
        least = np.log2(np.maximum(needed_tokens - sizes, 0.0) / host)
    retrieves = needed_tokens > 0
    missing = np.where(retrieves, least - log2_fraction, -np.inf)
    order = np.argsort(-logit, kind="stable")
    allowed = int(min(target * needed.size, missed * retrieves.sum()))
    best, found = np.inf, (float(logit.max()) + 1.0, _MOST_MARGIN)
    for quantile in _QUANTILES:
        streaming = round(quantile * len(logit))
        if streaming < len(logit):
            # A threshold cannot tell equal logits apart: either all of them stream or none.
            streaming = int((logit > logit[order[streaming]]).sum())
        left = allowed - int(retrieves[order[:streaming]].sum())
        if left < 0:
            break
        rest = order[streaming:]
        margin = _margin(missing[rest], left)
        if margin > _MOST_MARGIN:
            continue
        cost = float(
            (in_tokens(log2_fraction[rest] + margin, host_tokens[rest]) / host[rest]).sum()
        )
        if cost < best:
            lowest = float(logit[rest[0]]) if len(rest) else float(logit.min()) - 1.0
            best, found = cost, (lowest, margin)
    return found


def _margin(missing: Array, allowed: int) -> float:
    """The least margin with which at most `allowed` entries of what is missing exceed it."""
    if missing.size <= allowed:
        return _LEAST_MARGIN
    worst = np.partition(missing.ravel(), missing.size - 1 - allowed)[missing.size - 1 - allowed]
    return max(float(worst) + _BEYOND, _LEAST_MARGIN)
