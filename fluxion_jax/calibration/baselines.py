"""What a predictor has to beat: a constant, a table per head, and the label of the step before.

Each is tuned on the same part of the data to the same rates as the predictor, and rated on the same
held-out part. Axes: S steps, L global layers, N query heads, D granularities.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fluxion_jax.calibration.rating import Array, choose_safety, rate, with_safety
from fluxion_jax.calibration.samples import HeadSamples

# Half a unit of 16 tokens: where the step before needed nothing, a margin must act on something.
_LEAST_TOKENS = 8.0


def needed_budgets(samples: HeadSamples, tolerance_index: int) -> Array:
    """log2 of the budgets' share `[S, L, N, D]`; `-inf` for streaming."""
    tokens = np.moveaxis(samples.budget_tokens[:, tolerance_index], 1, -1).astype(np.float64)
    with np.errstate(divide="ignore"):
        found: Array = np.log2(tokens / samples.host_tokens[:, None, None, None])
    return found


def rate_baselines(
    train: HeadSamples,
    tuning: HeadSamples,
    held_out: HeadSamples,
    tolerance_index: int,
    target: float,
    missed: float,
) -> dict[str, dict[str, float]]:
    """Ratings of the baselines at one tolerance."""
    rated = {}
    table = needed_budgets(train, tolerance_index)
    for name in ("constant", "per_head", "last_step"):
        predictions = []
        for part in (tuning, held_out):
            if name == "last_step":
                logit, fraction = _last_step(part, tolerance_index)
            else:
                axes = (0, 1, 2) if name == "constant" else (0,)
                shape = needed_budgets(part, tolerance_index).shape
                logit, fraction = _table(table, axes, shape)
            predictions.append((logit.reshape(-1), fraction.reshape(-1, fraction.shape[-1])))
        (tuned_logit, tuned), (logit, fraction) = predictions
        threshold, margin = choose_safety(
            tuned_logit, tuned, *_flat(tuning, tolerance_index), target, missed
        )
        given = with_safety(logit, fraction, threshold, margin)
        rated[name] = rate(given, *_flat(held_out, tolerance_index))._asdict()
    return rated


def _flat(samples: HeadSamples, tolerance_index: int) -> tuple[Array, npt.NDArray[np.int32]]:
    needed = needed_budgets(samples, tolerance_index)
    heads = needed.shape[1] * needed.shape[2]
    return needed.reshape(-1, needed.shape[-1]), np.repeat(samples.host_tokens, heads)


def _table(table: Array, axes: tuple[int, ...], shape: tuple[int, ...]) -> tuple[Array, Array]:
    """How often a head streams in the training part, and the 0.9 quantile of its other budgets."""
    streams = np.isneginf(table)
    often = streams[..., 0].mean(axis=axes, keepdims=True)
    budgets = np.where(streams, np.nan, table)
    # A head that always streams has no other budget.
    always = streams.all(axis=axes, keepdims=True)
    budgets = np.where(always, 0.0, budgets)
    quantile = np.nanquantile(budgets, 0.9, axis=axes, keepdims=True)
    quantile = np.where(always, np.nanmin(np.where(streams, np.nan, table), initial=0.0), quantile)
    return np.broadcast_to(often, shape[:-1]), np.broadcast_to(quantile, shape)


def _last_step(samples: HeadSamples, tolerance_index: int) -> tuple[Array, Array]:
    """The label of the step before in the same stretch; a stretch's first step takes its own."""
    needed = needed_budgets(samples, tolerance_index)
    first = np.r_[True, samples.stretch[1:] != samples.stretch[:-1]]
    before = np.arange(len(needed)) - ~first
    last = needed[before]
    least = np.log2(_LEAST_TOKENS / samples.host_tokens)[:, None, None, None]
    return np.isneginf(last[..., 0]).astype(float), np.maximum(last, least)
