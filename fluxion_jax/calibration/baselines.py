"""What a predictor has to beat: a constant, a table per head, and the label of the step before.

Each is tuned on the same part of the data to the same safety as the predictor, and rated on the
same held-out part. Axes: S steps, L global layers, N query heads, D granularities.
"""

from __future__ import annotations

import numpy as np

from fluxion_jax.calibration.rating import Array, Judge, Predictions
from fluxion_jax.calibration.samples import HeadSamples

# Half a unit of 16 tokens: where the step before needed nothing, a margin must act on something.
_LEAST_TOKENS = 8.0


def needed_budgets(samples: HeadSamples, index: int) -> Array:
    """log2 of the budgets' share `[S, L, N, D]`; `-inf` for streaming."""
    tokens = np.moveaxis(samples.budget_tokens[:, index], 1, -1).astype(np.float64)
    with np.errstate(divide="ignore"):
        found: Array = np.log2(tokens / samples.host_tokens[:, None, None, None])
    return found


def rate_baselines(
    train: HeadSamples,
    tuning: HeadSamples,
    held_out: HeadSamples,
    judges: tuple[Judge, Judge],
    index: int,
    under_budget: float,
    error_left: float,
) -> dict[str, dict[str, float]]:
    """Ratings of the baselines at one tolerance.

    Args:
      train: what they learn from.
      tuning: what their safety is chosen on.
      held_out: what they are rated on.
      judges: of the last two, at the tolerance.
      index: of the tolerance in the samples' errors.
      under_budget: see `Judge.choose_safety`.
      error_left: likewise.
    """
    rated = {}
    table = needed_budgets(train, index)
    for name in ("constant", "per_head", "last_step"):
        tuned, predicted = (
            _last_step(part, index)
            if name == "last_step"
            else _table(table, (0, 1, 2) if name == "constant" else (0,), len(part.text))
            for part in (tuning, held_out)
        )
        safety = judges[0].choose_safety(tuned, under_budget, error_left)
        rated[name] = judges[1].rate(predicted, *safety)._asdict()
    return rated


def _table(table: Array, axes: tuple[int, ...], steps: int) -> Predictions:
    """How often a head streams in the training part, and the 0.9 quantile of its other budgets."""
    shape = (steps, *table.shape[1:])
    streams = np.isneginf(table)
    often = streams[..., 0].mean(axis=axes, keepdims=True)
    budgets = np.where(streams, np.nan, table)
    # A head that always streams has no other budget.
    always = streams.all(axis=axes, keepdims=True)
    budgets = np.where(always, 0.0, budgets)
    quantile = np.nanquantile(budgets, 0.9, axis=axes, keepdims=True)
    quantile = np.where(always, np.nanmin(np.where(streams, np.nan, table), initial=0.0), quantile)
    return Predictions(np.broadcast_to(often, shape[:-1]), np.broadcast_to(quantile, shape))


def _last_step(samples: HeadSamples, index: int) -> Predictions:
    """The label of the step before in the same text; a text's first step takes its own."""
    needed = needed_budgets(samples, index)
    first = np.r_[True, samples.text[1:] != samples.text[:-1]]
    before = np.arange(len(needed)) - ~first
    last = needed[before]
    least = np.log2(_LEAST_TOKENS / samples.host_tokens)[:, None, None, None]
    return Predictions(np.isneginf(last[..., 0]).astype(float), np.maximum(last, least))
