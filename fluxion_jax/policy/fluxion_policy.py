"""The Fluxion policy: features, predictor and selector, compiled into the decode step.

In every layer of every step each head's needs are predicted from what the device has at hand, and
each group gets the granularity that reads the fewest bytes (paper, section 4). The tolerance of the
output error is the one dial: it is data, like the weights, so that turning it does not recompile.

Axes: B batch, N query heads, K KV heads, D = 4 granularities, E calibrated tolerances.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import pallas_kernels
from fluxion_jax.cache.layout import GRANULARITIES_TOKENS, KVLayout
from fluxion_jax.errors import ConfigError
from fluxion_jax.policy.features import Formulas, look
from fluxion_jax.policy.head_predictor import HEAD_VECTOR, as_needs, standardised
from fluxion_jax.policy.protocol import Features, Plan
from fluxion_jax.policy.selector import choose, select_granularity
from pallas_kernels import HEADS, Heads

DEFAULT_TOLERANCE = 0.3
"""Error of a head's output over the step's largest that is accepted by default.

With it recall-12m answered 40 samples of each task and length of the frozen protocol as with full
attention, within the intervals at all lengths; with 0.5 it lost 1.0 and 0.7 of 100 points at 4,096
and 8,192 tokens (`benchmarks/results/evaluate-fluxion-recall-12m.json`).
"""

_DOUBLINGS = tuple(math.log2(x / GRANULARITIES_TOKENS[0]) for x in GRANULARITIES_TOKENS)
# 2**30 tokens are more than any cache holds, and int32 holds them.
_MOST_LOG2_TOKENS = 30.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Safety:
    """What the calibration puts on top of the predictions to keep its under-budget rate.

    Attributes:
      tolerances: float32 `[E]`, ascending; in between, values are interpolated over the logarithm.
      streaming_logit: float32 `[E]`, a head streams if its logit is above.
      margin: float32 `[E]`, added to log2 of the budget.
    """

    tolerances: Any
    streaming_logit: Any
    margin: Any

    def at(self, tolerance: Any) -> tuple[jax.Array, jax.Array]:
        """`(streaming_logit, margin)` at a tolerance."""
        known = jnp.log2(self.tolerances)
        # As jnp.interp, which searches in a loop that a GPU leaves to its host.
        passed = jnp.clip((jnp.log2(tolerance) - known[:-1]) / jnp.diff(known), 0.0, 1.0)
        logit, margin = (
            x[0] + (passed * jnp.diff(x)).sum()
            for x in map(jnp.asarray, (self.streaming_logit, self.margin))
        )
        return logit, margin


class FluxionNotes(NamedTuple):
    """What the policy predicted, for research; see `Plan.notes`.

    Attributes:
      streaming_logit: float32 `[B, N]`, above 0 where the head streams by the calibrated threshold.
      log2_fraction: float32 `[B, N, D]`, of the budget over the host's tokens, margin included.
    """

    streaming_logit: jax.Array
    log2_fraction: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FluxionPolicy:
    """Plans by prediction; load one with `fluxion` or by the name `"fluxion"`.

    Attributes:
      weights: state of the `HeadPredictor`, from `nnx.split`.
      safety: thresholds and margins by tolerance.
      tolerance: float32 scalar, accepted error of a head's output over the step's largest.
      graph: static part of the predictor.
    """

    weights: Any
    safety: Safety
    tolerance: Any
    graph: Any = dataclasses.field(metadata={"static": True})
    needs_sketch: ClassVar[bool] = True

    def plan(self, features: Features, lengths: jax.Array) -> Plan:
        """Plans each head by its predicted needs; see `Policy.plan`."""
        batch, heads, _ = features.q.shape
        if features.capacity_blocks == 0:
            return _nothing_to_read(batch, heads, features.num_kv_heads)
        seen = look(features)
        predictor = nnx.merge(self.graph, self.weights)
        known_layers, known_heads = predictor.heads.shape[:2]
        if features.layer >= known_layers or heads != known_heads:
            raise ConfigError(
                f"expected a model of {known_layers} layers and {known_heads} query heads, for "
                f"which the predictor was calibrated, got layer {features.layer} with {heads}; "
                "calibrate for this model"
            )
        by_sequence = functools.partial(
            pallas_kernels.by_sequence, num_heads=heads, num_kv_heads=features.num_kv_heads
        )
        weights = {
            "mean": predictor.mean[...],
            "deviation": predictor.deviation[...],
            "vectors": predictor.heads[...],
            "tolerance": jnp.asarray(self.tolerance, jnp.float32),
        }
        # Many results of a few operations each, on as many numbers as a warp has lanes.
        (inputs,) = by_sequence(
            PredictorInputs(seen.formulas),
            seen.rows,
            seen.shared | weights,
            num_warps=2,
            programs=4,
        )
        hidden = predictor.hidden_layers(inputs.reshape(len(inputs), -1))
        threshold, margin = self.safety.at(self.tolerance)
        bias: Any = predictor.out.bias
        (granularity,), (budget_tokens,), (clipped,), (logit,), log2_fraction = by_sequence(
            Conclusion(features.layout),
            {"hidden": hidden.reshape(batch, heads, -1), "host_tokens": features.host_tokens},
            {
                "kernel": predictor.out.kernel[...],
                "bias": bias[...],
                "threshold": threshold,
                "margin": margin,
            },
            num_warps=8,
        )
        return Plan(
            granularity=granularity,
            budget_tokens=budget_tokens,
            shared=jnp.zeros(granularity.shape, bool),
            clipped=clipped != 0,
            notes=FluxionNotes(logit, jnp.moveaxis(log2_fraction, 0, -1)),
        )

    def with_tolerance(self, tolerance: float) -> FluxionPolicy:
        """The same policy at another tolerance.

        Raises:
          ConfigError: it lies outside of the calibrated range.
        """
        known = np.asarray(self.safety.tolerances, np.float64)
        # A tolerance that went through float32 must still be within.
        if not known[0] * (1 - 1e-6) <= tolerance <= known[-1] * (1 + 1e-6):
            raise ConfigError(
                f"expected a tolerance within the calibrated range, {known[0]:.3g} to "
                f"{known[-1]:.3g}, got {tolerance}"
            )
        return dataclasses.replace(self, tolerance=np.asarray(tolerance, np.float32))

    def __str__(self) -> str:
        return f"fluxion:tolerance={float(self.tolerance):.6g}"


@dataclasses.dataclass(frozen=True)
class PredictorInputs:
    """What the network takes, of the heads of one sequence; a function of `by_sequence`.

    Attributes:
      formulas: of the features.
    """

    formulas: Formulas

    def __call__(self, heads: Heads) -> tuple[list[jax.Array]]:
        """One list of float32 `[N]`; see `HeadPredictor.hidden_layers`."""
        features = [
            standardised(x, heads.load("mean", i), heads.load("deviation", i))
            for i, x in enumerate(self.formulas.of(heads))
        ]
        tolerance = jnp.log2(heads.load("tolerance"))
        layer = heads.load("layer")
        vector = [heads.load("vectors", layer, HEADS, i) for i in range(HEAD_VECTOR)]
        return ([*features, tolerance, *vector],)


@dataclasses.dataclass(frozen=True)
class Conclusion:
    """The plan of the heads of one sequence from the last hidden layer; of `by_sequence`.

    Attributes:
      layout: of the cache.
    """

    layout: KVLayout

    def __call__(self, heads: Heads) -> tuple[list[jax.Array], ...]:
        """What `choose` returns, the logit, and log2 of the budgets' share, in lists of `[N]`."""
        hidden = heads.load("hidden", HEADS, ...)
        streaming, base, growth = (
            jnp.sum(hidden * heads.load("kernel", ..., i)[None, :], axis=1) + heads.load("bias", i)
            for i in range(3)
        )
        needs = as_needs(streaming, base, growth)
        margin = heads.load("margin")
        logit = needs.streaming - heads.load("threshold")
        log2_fraction = [needs.base + needs.growth * doublings + margin for doublings in _DOUBLINGS]
        held = heads.load("host_tokens")
        return (
            *choose(heads, _asked(logit, log2_fraction, held), held, self.layout),
            [logit],
            log2_fraction,
        )


def plan_budgets(
    logit: jax.Array, log2_fraction: jax.Array, host_tokens: jax.Array, layout: KVLayout
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What is planned for predictions to which the safety was applied.

    Args:
      logit: float32 `[B, N]`, above 0 for a head that streams.
      log2_fraction: float32 `[B, N, D]`, of the budget over the host's tokens.
      host_tokens: int32 `[B]`.
      layout: of the cache.

    Returns:
      As `select_granularity`.
    """
    asked = _asked(logit, jnp.moveaxis(log2_fraction, -1, 0), host_tokens[:, None])
    return select_granularity(jnp.stack(asked, axis=-1), host_tokens, layout)


def _asked(logit: jax.Array, log2_fraction: Any, host_tokens: jax.Array) -> list[jax.Array]:
    """Budgets in tokens before they are rounded and cut, for each of `log2_fraction`."""
    log2_tokens = jnp.log2(jnp.maximum(host_tokens, 1).astype(jnp.float32))
    asked = []
    for fraction in log2_fraction:
        tokens = jnp.exp2(jnp.minimum(log2_tokens + fraction, _MOST_LOG2_TOKENS))
        # What is not a number must be read, so that the fault surfaces.
        tokens = jnp.where(tokens < jnp.inf, tokens, 2.0**_MOST_LOG2_TOKENS)
        tokens = jnp.where(logit > 0.0, 0.0, jnp.maximum(tokens, 1.0))
        asked.append(jnp.ceil(tokens).astype(jnp.int32))
    return asked


def _nothing_to_read(batch: int, heads: int, kv_heads: int) -> Plan:
    """The plan of a cache that fits into the window."""
    return Plan(
        granularity=jnp.full((batch, kv_heads), GRANULARITIES_TOKENS[-1], jnp.int32),
        budget_tokens=jnp.zeros((batch, heads), jnp.int32),
        shared=jnp.zeros((batch, kv_heads), bool),
    )
