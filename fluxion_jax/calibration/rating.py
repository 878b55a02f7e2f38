"""Rating predictions by what would be planned for them, and the safety that they need.

What is rated is what the selector plans: one granularity for each group, and budgets in whole
units. A budget falls short if it is below the smallest that keeps to the tolerance. How many fall
short says little: most of those heads miss next to nothing, and one that misses what was asked for
costs the answer. So what the safety bounds is the *error left*: by how much a head's error exceeds
the tolerance, as a Euclidean norm over the heads of all layers, because their errors add up in one
step, and as a mean over steps.

Axes: S steps, L layers, N query heads, K KV heads, R = S * L, E errors, D granularities.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from fluxion_jax.cache.layout import GRANULARITIES_TOKENS, KVLayout
from fluxion_jax.calibration.samples import HeadSamples
from fluxion_jax.policy.fluxion_policy import plan_budgets
from fluxion_jax.policy.selector import select_granularity

Array = npt.NDArray[np.floating[Any]]

# Thresholds are tried at these quantiles of the logits; above all of them nothing streams.
_QUANTILES = np.concatenate([np.linspace(0.0, 0.9, 19), np.linspace(0.91, 0.99, 9), [1.0]])
_LEAST_MARGIN, _MOST_MARGIN = -4.0, 12.0
# 2 ** -9 of the range: 2 % of a budget.
_HALVINGS = 9


class Predictions(NamedTuple):
    """Needs of heads before any safety.

    Attributes:
      logit: float `[S, L, N]`, higher for streaming.
      log2_fraction: float `[S, L, N, D]`, of the budget over the host's tokens.
    """

    logit: Array
    log2_fraction: Array


class Rating(NamedTuple):
    """How plans compare with what was needed.

    Attributes:
      accuracy: share of heads and steps whose class, streaming or retrieval, is right.
      under_budget: share of heads and steps whose budget is too small.
      missed: the same among those that need more than the window.
      error_left: see the module's text.
      over_provisioning: host bytes of the plans over those of plans that know what is needed.
      given_fraction: host bytes of the plans, summaries included, over those of all K/V.
      needed_fraction: likewise of plans that know.
    """

    accuracy: float
    under_budget: float
    missed: float
    error_left: float
    over_provisioning: float
    given_fraction: float
    needed_fraction: float


class Judge:
    """Rates predictions for samples at one of their errors, taken as the tolerance."""

    def __init__(self, samples: HeadSamples, index: int) -> None:
        """Takes what was needed.

        Args:
          samples: what to rate for.
          index: of the tolerance in `samples.errors`.
        """
        layers = len(samples.layers)
        budgets = np.moveaxis(samples.budget_tokens, 3, 1)
        self._needs = (
            jnp.asarray(budgets.reshape(-1, *budgets.shape[2:])),
            jnp.asarray(samples.window_error.reshape(-1, samples.window_error.shape[-1])),
            jnp.asarray(np.repeat(samples.host_tokens, layers)),
            jnp.asarray(samples.errors, jnp.float32),
            jnp.asarray(index),
        )
        self._layers, self._layout = layers, samples.layout

    def rate(self, predictions: Predictions, threshold: float, margin: float) -> Rating:
        """Rates what is planned with a threshold and a margin."""
        return self._rate(self._on_device(predictions), threshold, margin)

    def choose_safety(
        self, predictions: Predictions, under_budget: float, error_left: float
    ) -> tuple[float, float]:
        """The threshold and margin whose plans read the fewest bytes and are safe.

        Args:
          predictions: for the samples.
          under_budget: at most this share may fall short.
          error_left: at most this much error may be left.

        Returns:
          `(threshold, margin)`. If no margin suffices, nothing streams and the margin is largest.
        """
        on_device = self._on_device(predictions)
        logits = np.sort(predictions.logit, axis=None)[::-1]
        best, found = np.inf, (float(logits[0]) + 1.0, _MOST_MARGIN)

        def safe(threshold: float, margin: float) -> Rating | None:
            rating = self._rate(on_device, threshold, margin)
            good = rating.under_budget <= under_budget and rating.error_left <= error_left
            return rating if good else None

        for quantile in _QUANTILES:
            streaming = round(quantile * logits.size)
            last = streaming == logits.size
            threshold = float(logits[-1]) - 1.0 if last else float(logits[streaming])
            if safe(threshold, _MOST_MARGIN) is None:
                # Who streams wrongly is not helped by any margin.
                break
            low, high = _LEAST_MARGIN, _MOST_MARGIN
            for _ in range(_HALVINGS):
                middle = (low + high) / 2
                if safe(threshold, middle) is None:
                    low = middle
                else:
                    high = middle
            rating = self._rate(on_device, threshold, high)
            if rating.given_fraction < best:
                best, found = rating.given_fraction, (threshold, high)
        return found

    def _on_device(self, predictions: Predictions) -> tuple[jax.Array, jax.Array]:
        flat = (x.reshape(-1, *x.shape[2:]) for x in predictions)
        logit, fraction = (jnp.asarray(x, jnp.float32) for x in flat)
        return logit, fraction

    def _rate(
        self, predictions: tuple[jax.Array, jax.Array], threshold: float, margin: float
    ) -> Rating:
        found = _rated(
            *predictions, *self._needs, threshold, margin, layers=self._layers, layout=self._layout
        )
        accuracy, under_budget, missed, error_left, given, needed = map(float, found)
        over = given / needed if needed else float(given > 0) + 1.0
        return Rating(accuracy, under_budget, missed, error_left, over, given, needed)


@functools.partial(jax.jit, static_argnames=("layers", "layout"))
def _rated(
    logit: jax.Array,
    log2_fraction: jax.Array,
    needed: jax.Array,
    window_error: jax.Array,
    host_tokens: jax.Array,
    errors: jax.Array,
    index: jax.Array,
    threshold: jax.Array,
    margin: jax.Array,
    *,
    layers: int,
    layout: KVLayout,
) -> tuple[jax.Array, ...]:
    """Of `[R, N]`, `[R, N, D]`, needs `[R, E, D, N]` before rounding, `[R, N]` and `[R]`."""
    tolerance = errors[index]
    plan = plan_budgets(logit - threshold, log2_fraction + margin, host_tokens, layout)
    granularity, given, _ = plan
    heads = logit.shape[1]
    size = jnp.repeat(granularity, heads // layout.num_kv_heads, axis=1)
    most = -(-host_tokens[:, None] // size) * size
    level = (size // GRANULARITIES_TOKENS[0]).astype(jnp.float32)
    level = jnp.round(jnp.log2(level)).astype(jnp.int32)
    own = jnp.take_along_axis(needed, level[:, None, None, :], axis=2)[:, :, 0]
    short = given[:, None] < jnp.minimum(own, most[:, None])
    left = jnp.where(
        short.all(axis=1), window_error, errors[jnp.argmin(short.astype(jnp.int32), axis=1)]
    )
    excess = jnp.maximum(jnp.minimum(left, window_error) - tolerance, 0.0)
    of_step = jnp.sqrt((excess.reshape(-1, layers * heads) ** 2).sum(axis=-1))

    short, own = short[:, index], own[:, index]
    retrieves = own > 0
    at_all = jnp.moveaxis(needed[:, index], 1, 2)
    ideal_granularity, ideal, _ = select_granularity(at_all, host_tokens, layout)
    whole = host_tokens.sum() * 1.0 * layout.num_kv_heads
    return (
        ((given > 0) == retrieves).mean(),
        short.mean(),
        short.sum() / jnp.maximum(retrieves.sum(), 1),
        of_step.mean(),
        _read(granularity, given, host_tokens, layout) / whole,
        _read(ideal_granularity, ideal, host_tokens, layout) / whole,
    )


def _read(
    granularity: jax.Array, budget_tokens: jax.Array, host_tokens: jax.Array, layout: KVLayout
) -> jax.Array:
    """Host bytes of plans, in bytes of a token's K/V: at most, as the selector counts them."""
    grouped = budget_tokens.reshape(*granularity.shape, -1).sum(axis=-1)
    read = jnp.minimum(grouped, host_tokens[:, None])
    units = jnp.where(read > 0, -(-host_tokens[:, None] // granularity), 0)
    summary = layout.unit_summary_bytes / (layout.block_bytes / GRANULARITIES_TOKENS[0])
    return read.sum() + units.sum() * summary
