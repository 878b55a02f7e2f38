"""What the predictor looks at: 57 numbers for each query head, in seven families.

All of them come from what is on the device anyway: this step's query, the resident window and
attention over it, and the layer's sketch (`cache.sketch`), whose drawn tokens stand for the host.
Costs are multiply-adds per query head, with W window slots, M runs of the sketch (at most 512) and
head size H; everything else is a few operations per number.

Notation: `q` the query, `lse_w`, `out_w` the window's attention state; over drawn tokens `j`, each
weighted by the `w_j` host tokens of its run, `s_j = scale * q . k_j`, `lse_h = log sum w_j exp s_j`,
`p_j = w_j exp(s_j - lse_h)`, `out_h = sum p_j v_j`; `u_j` the bound of a run,
`scale * sum_h max(q_h low_jh, q_h high_jh)`; `m = sigmoid(lse_h - lse_w)` the host's share;
`err = m |out_h - out_w| / max over heads |(1 - m) out_w + m out_h|`, the estimated error of the
window alone. Logarithms of quantities are to base 2, odds are natural.

| Family | Features | Cost |
|---|---|---|
| structural | place of the layer, of the KV head and of the head in its group, 0 to 1; log of the host's tokens and of the tokens of a run | - |
| KV distribution | log of the mean key norm, its relative deviation, log of mean value norm, largest over mean value norm, `|mean k| / mean |k|`, the same of values | 4 M H / G |
| QK interaction | largest `s_j`, mean `s_j`, deviation of `s_j`, `lse_h` and largest `u_j`, all but the deviation less `lse_w`; largest less mean `u_j`; log of the tokens behind the entropy of `p`; log of the runs behind `sum p^2`; largest `p_j`; log of the runs whose bound reaches 1 % and 10 % of the window; of those whose `u_j` is above `lse_w`, and above the window's largest score; of those within 1 and within 4 of the largest `u_j`; deviation of `u_j`, and how many of them the largest lies above the mean; log of `scale |q|` | 3 M H |
| output contribution of the window | log of `err`; `m`; cosine of `out_h` and `out_w`; log of `|out_w|` over the largest head's; odds of the sinks, of the newest 16 and of the largest score in the window | W H + M H |
| query dynamics | cosine with the query of the step before, log ratio of norms, change of `lse_w`; cosine with the probed queries; whether there was a step before | H |
| budgets at prefill | the nine `PROBES`; log of the tokens since | - |
| cross-head | mean and largest `log err` in the group, in the layer; mean of `m` in the group; largest probed window error in the group | - |

Axes: B batch, N query heads, K KV heads, G = N // K.
"""  # noqa: E501

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

import pallas_kernels
from fluxion_jax.cache.layout import BLOCK_TOKENS
from fluxion_jax.cache.sketch import PROBES, run_blocks
from fluxion_jax.errors import ConfigError
from fluxion_jax.policy.protocol import NEWEST_TOKENS, Features
from pallas_kernels import HEADS, LARGEST_ODDS, Heads, HeadStatistics

FAMILIES: dict[str, tuple[str, ...]] = {
    "structural": ("layer", "kv_head", "head_in_group", "host_tokens", "run_tokens"),
    "kv_distribution": (
        "key_norm",
        "key_norm_deviation",
        "value_norm",
        "value_norm_peak",
        "key_coherence",
        "value_coherence",
    ),
    "qk_interaction": (
        "score_peak",
        "score_mean",
        "score_deviation",
        "host_odds",
        "bound_peak",
        "bound_range",
        "entropy_tokens",
        "participation_runs",
        "share_peak",
        "bounds_above_1_percent",
        "bounds_above_10_percent",
        "bounds_above_window",
        "bounds_above_window_peak",
        "bounds_within_1_of_peak",
        "bounds_within_4_of_peak",
        "bound_deviation",
        "bound_peak_deviations",
        "query_norm",
    ),
    "output_contribution": (
        "window_error",
        "host_share",
        "out_cosine",
        "out_norm",
        "sink_odds",
        "newest_odds",
        "window_peak_odds",
    ),
    "query_dynamics": (
        "query_cosine",
        "query_norm_change",
        "window_lse_change",
        "probe_cosine",
        "has_previous",
    ),
    "prefill_budgets": (*(f"probe_{name}" for name in PROBES), "tokens_since_probe"),
    "cross_head": (
        "group_error_mean",
        "group_error_peak",
        "layer_error_mean",
        "layer_error_peak",
        "group_share_mean",
        "group_probe_error_peak",
    ),
}
"""Names of the features by family, in the order of `head_features`."""

NAMES = tuple(name for family in FAMILIES.values() for name in family)
NUM_FEATURES = len(NAMES)

_LEAST = 1e-6
# Of scores, which are natural logarithms: bounds that differ by less are as good as equal.
_LEAST_DEVIATION = 1e-3


@dataclasses.dataclass(frozen=True)
class Seen:
    """What the features of a layer are computed from, as operands of `pallas_kernels.by_sequence`.

    Attributes:
      rows: arrays of sequences by name.
      shared: arrays that all sequences see.
      formulas: what makes features of them.
    """

    rows: dict[str, jax.Array]
    shared: dict[str, jax.Array]
    formulas: Formulas


def look(features: Features, *, implementation: pallas_kernels.Implementation = None) -> Seen:
    """Takes all passes over keys and values that the features need.

    Args:
      features: of a layer whose cache keeps a sketch.
      implementation: of `pallas_kernels.head_statistics`.

    Raises:
      ConfigError: the cache keeps no sketch.
    """
    sketch = features.sketch
    if sketch is None:
        raise ConfigError(
            "expected a cache that keeps a sketch, on one device, got none; allocate it with "
            "model.config.kv_layout(..., sketch=True)"
        )
    newest = features.window_positions.max(axis=-1)
    run_tokens = run_blocks(features.capacity_blocks) * BLOCK_TOKENS
    window_scores = features.window_scores
    if window_scores is None:
        window_scores = pallas_kernels.window_scores(
            features.q,
            features.window_k,
            features.window_positions,
            newest,
            scale=features.scale,
            sink_tokens=features.layout.sink_tokens,
            newest_tokens=NEWEST_TOKENS,
        )
    found = pallas_kernels.head_statistics(
        features.q,
        features.window_out,
        features.window_lse,
        window_scores,
        newest,
        sketch.runs,
        features.host_tokens,
        sketch.previous_q,
        sketch.probe_q,
        scale=features.scale,
        run_tokens=run_tokens,
        implementation=implementation,
    )
    rows = {
        "statistics": found,
        "window_lse": features.window_lse,
        "host_tokens": features.host_tokens,
        "newest": newest,
        "previous_lse": sketch.previous_lse,
        "previous_position": sketch.previous_position,
        "probes": sketch.probes,
        "probe_position": sketch.probe_position,
    }
    layer = {"layer": jnp.asarray(features.layer, jnp.int32)}
    formulas = Formulas(features.layout.num_layers, features.scale, run_tokens)
    return Seen(rows, layer, formulas)


def head_features(
    features: Features, *, implementation: pallas_kernels.Implementation = None
) -> jax.Array:
    """The predictor's input for every query head.

    Args:
      features: of a layer whose cache keeps a sketch.
      implementation: of `pallas_kernels.head_statistics`, which does all but a few operations, and
        of `pallas_kernels.by_sequence`, which does those.

    Returns:
      float32 `[B, N, NUM_FEATURES]` in the order of `NAMES`. In rows that take part a value is not
      finite only if a query, key or value is not.

    Raises:
      ConfigError: the cache keeps no sketch.
    """
    seen = look(features, implementation=implementation)
    (found,) = pallas_kernels.by_sequence(
        seen.formulas,
        seen.rows,
        seen.shared,
        num_heads=features.q.shape[1],
        num_kv_heads=features.num_kv_heads,
        implementation=implementation,
    )
    return jnp.moveaxis(found, 0, -1)


@dataclasses.dataclass(frozen=True)
class Formulas:
    """The features of the heads of one sequence, out of what `look` has found.

    Attributes:
      num_layers: of the model.
      scale: factor on the scores.
      run_tokens: tokens of a run of the sketch.
    """

    num_layers: int
    scale: float
    run_tokens: int

    def __call__(self, heads: Heads) -> tuple[list[jax.Array]]:
        """As a function of `pallas_kernels.by_sequence`: one list, in the order of `NAMES`."""
        return (self.of(heads),)

    def of(self, heads: Heads) -> list[jax.Array]:
        """Float32 `[N]` each, or scalars that all heads share, in the order of `NAMES`."""
        found = HeadStatistics(
            *(heads.load("statistics", HEADS, i) for i in range(len(HeadStatistics._fields)))
        )
        window = heads.load("window_lse", HEADS)
        mass = _sigmoid(_odds(found.host_lse - window))
        error = _log2(mass * found.change_norm / _or_one(heads.largest(found.whole_norm)))
        by_name = {
            **self._structural(heads),
            **_kv_distribution(found),
            **self._qk_interaction(found, window),
            **_output_contribution(heads, found, window, mass, error),
            **_query_dynamics(heads, found, window),
            **_prefill_budgets(heads),
            **_cross_head(heads, mass, error),
        }
        return [by_name[name] for name in NAMES]

    def _structural(self, heads: Heads) -> dict[str, jax.Array]:
        index, group = heads.index, heads.group
        layer = heads.load("layer").astype(jnp.float32)
        return {
            "layer": layer / self.num_layers,
            "kv_head": (index // group).astype(jnp.float32) / heads.num_kv_heads,
            "head_in_group": (index % group).astype(jnp.float32) / group,
            "host_tokens": _log2_of_count(heads.load("host_tokens")),
            "run_tokens": jnp.full(index.shape, math.log2(self.run_tokens), jnp.float32),
        }

    def _qk_interaction(self, found: HeadStatistics, window: jax.Array) -> dict[str, jax.Array]:
        bound_range = found.bound_peak - found.bound_mean
        return {
            "score_peak": _odds(found.score_peak - window),
            "score_mean": _odds(found.score_mean - window),
            "score_deviation": found.score_deviation,
            "host_odds": _odds(found.host_lse - window),
            "bound_peak": _odds(found.bound_peak - window),
            "bound_range": bound_range,
            "entropy_tokens": found.entropy_bits,
            "participation_runs": -_log2(found.share_squares),
            "share_peak": found.share_peak,
            "bounds_above_1_percent": _log2_of_count(found.above_1_percent),
            "bounds_above_10_percent": _log2_of_count(found.above_10_percent),
            "bounds_above_window": _log2_of_count(found.above_window),
            "bounds_above_window_peak": _log2_of_count(found.above_window_peak),
            "bounds_within_1_of_peak": _log2_of_count(found.within_1_of_peak),
            "bounds_within_4_of_peak": _log2_of_count(found.within_4_of_peak),
            "bound_deviation": found.bound_deviation,
            "bound_peak_deviations": bound_range
            / jnp.maximum(found.bound_deviation, _LEAST_DEVIATION),
            "query_norm": _log2(self.scale * found.query_norm),
        }


def _kv_distribution(found: HeadStatistics) -> dict[str, jax.Array]:
    key, value = (jnp.maximum(x, _LEAST) for x in (found.key_norm, found.value_norm))
    return {
        "key_norm": _log2(key),
        "key_norm_deviation": found.key_norm_deviation / key,
        "value_norm": _log2(value),
        "value_norm_peak": found.value_norm_peak / value,
        "key_coherence": found.mean_key_norm / key,
        "value_coherence": found.mean_value_norm / value,
    }


def _output_contribution(
    heads: Heads, found: HeadStatistics, window: jax.Array, mass: jax.Array, error: jax.Array
) -> dict[str, jax.Array]:
    largest = _or_one(heads.largest(found.window_out_norm))
    return {
        "window_error": error,
        "host_share": mass,
        "out_cosine": _cosine(found.out_product, found.host_out_norm, found.window_out_norm),
        "out_norm": _log2(found.window_out_norm / largest),
        "sink_odds": _odds(found.sink_lse - window),
        "newest_odds": _odds(found.newest_lse - window),
        "window_peak_odds": _odds(found.window_peak - window),
    }


def _query_dynamics(heads: Heads, found: HeadStatistics, window: jax.Array) -> dict[str, jax.Array]:
    before = heads.load("newest") - 1
    # The parity of a position, also of -2.
    slot = before & 1
    known = (heads.load("previous_position", slot) == before) & (before >= 0)
    lse = heads.load("previous_lse", slot, HEADS)
    change = _log2(found.query_norm) - _log2(found.previous_norm)
    to_previous = _cosine(found.previous_product, found.query_norm, found.previous_norm)
    to_probed = _cosine(found.probe_product, found.query_norm, found.probe_norm)
    return {
        "query_cosine": _where(known, to_previous),
        "query_norm_change": _where(known, change),
        "window_lse_change": _where(known, _odds(window - lse)),
        "probe_cosine": _where(_probed(heads), to_probed),
        "has_previous": known.astype(jnp.float32),
    }


def _prefill_budgets(heads: Heads) -> dict[str, jax.Array]:
    probed = _probed(heads)
    since = heads.load("newest") - heads.load("probe_position")
    age = _log2_of_count(jnp.maximum(since, 0))
    return {
        **{
            f"probe_{name}": _where(probed, heads.load("probes", HEADS, i))
            for i, name in enumerate(PROBES)
        },
        "tokens_since_probe": jnp.where(probed, age, 0.0),
    }


def _cross_head(heads: Heads, mass: jax.Array, error: jax.Array) -> dict[str, jax.Array]:
    probe = _where(_probed(heads), heads.load("probes", HEADS, 0))
    return {
        "group_error_mean": heads.total_of_group(error) / heads.group,
        "group_error_peak": heads.largest_of_group(error),
        "layer_error_mean": heads.total(error) / heads.num_heads,
        "layer_error_peak": heads.largest(error),
        "group_share_mean": heads.total_of_group(mass) / heads.group,
        "group_probe_error_peak": heads.largest_of_group(probe),
    }


def _probed(heads: Heads) -> jax.Array:
    return heads.load("probe_position") >= 0


def _where(condition: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(jnp.broadcast_to(condition, x.shape), x, 0.0)


def _or_one(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0.0, x, 1.0)


def _cosine(product: jax.Array, *norms: jax.Array) -> jax.Array:
    return product / jnp.maximum(norms[0] * norms[1], _LEAST)


def _log2(x: jax.Array) -> jax.Array:
    return jnp.log2(x + _LEAST)


def _log2_of_count(x: jax.Array) -> jax.Array:
    return jnp.log2(1.0 + x.astype(jnp.float32))


def _sigmoid(x: jax.Array) -> jax.Array:
    return 1.0 / (1.0 + jnp.exp(-x))


def _odds(x: jax.Array) -> jax.Array:
    """Bounds a difference of logarithms, one of which may be of nothing; NaN stays NaN."""
    # A GPU's minimum of a number and none is the number.
    return jnp.where(x == x, jnp.clip(x, -LARGEST_ODDS, LARGEST_ODDS), x)
