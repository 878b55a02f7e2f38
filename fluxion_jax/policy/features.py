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

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fluxion_jax.cache.layout import BLOCK_TOKENS
from fluxion_jax.cache.sketch import PROBES, Sketch, run_blocks
from fluxion_jax.errors import ConfigError
from fluxion_jax.policy.protocol import Features

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
# Odds of a part that is empty, and of one that is everything, must stay numbers.
_LARGEST = 30.0
_NEWEST_TOKENS = 16


class _Host(NamedTuple):
    """The sketch seen by the queries: estimates of attention over the host."""

    log_weight: jax.Array  # [B, M], log of the host tokens of each run, -inf for none
    scores: jax.Array  # [B, N, M]
    bounds: jax.Array  # [B, N, M]
    lse: jax.Array  # [B, N]
    share: jax.Array  # [B, N, M], of the host's mass
    out: jax.Array  # [B, N, H]


def head_features(features: Features) -> jax.Array:
    """The predictor's input for every query head.

    Args:
      features: of a layer whose cache keeps a sketch.

    Returns:
      float32 `[B, N, NUM_FEATURES]` in the order of `NAMES`. In rows that take part a value is not
      finite only if a query, key or value is not.

    Raises:
      ConfigError: the cache keeps no sketch.
    """
    host = _attend_sketch(features)
    mass = jax.nn.sigmoid(_odds(host.lse - features.window_lse))
    error = _window_error(features, host, mass)
    window_scores = _window_scores(features)
    by_name = {
        **_structural(features),
        **_kv_distribution(features, host),
        **_qk_interaction(features, host, window_scores),
        **_output_contribution(features, host, mass, error, window_scores),
        **_query_dynamics(features),
        **_prefill_budgets(features),
        **_cross_head(features, mass, error),
    }
    shape = features.window_lse.shape
    return jnp.stack([jnp.broadcast_to(by_name[name], shape) for name in NAMES], axis=-1)


def _attend_sketch(features: Features) -> _Host:
    runs = _sketch(features).runs
    host_tokens = features.host_tokens
    run_tokens = run_blocks(features.capacity_blocks) * BLOCK_TOKENS
    tokens = jnp.clip(
        host_tokens[:, None] - jnp.arange(runs.shape[2]) * run_tokens, 0, run_tokens
    ).astype(jnp.float32)
    exists = tokens > 0
    log_weight = jnp.where(exists, jnp.log(jnp.maximum(tokens, 1.0)), -jnp.inf)
    k, v, negated_low, high = (
        # What no block has reached may hold anything, and 0 * NaN is NaN.
        jnp.where(exists[:, None, :, None], runs[:, :, :, i].astype(jnp.float32), 0.0)
        for i in range(4)
    )
    q = _grouped(features)
    shape = features.window_lse.shape

    def products(x: jax.Array, keys: jax.Array) -> jax.Array:
        return jnp.einsum("bkgh,bkmh->bkgm", x, keys, precision="highest")

    scores = products(q, k) * features.scale
    bounds = products(jnp.maximum(q, 0), high) + products(jnp.maximum(-q, 0), negated_low)
    weighted = scores + log_weight[:, None, None]
    lse = jax.nn.logsumexp(weighted, axis=-1)
    share = jnp.exp(weighted - jnp.where(jnp.isneginf(lse), 0.0, lse)[..., None])
    out = jnp.einsum("bkgm,bkmh->bkgh", share, v, precision="highest")
    return _Host(
        log_weight,
        scores.reshape(*shape, -1),
        (bounds * features.scale).reshape(*shape, -1),
        lse.reshape(shape),
        share.reshape(*shape, -1),
        out.reshape(features.q.shape),
    )


def _window_error(features: Features, host: _Host, mass: jax.Array) -> jax.Array:
    """Estimated error of the window alone over the layer's largest head output, log2 `[B, N]`."""
    whole = features.window_out + mass[..., None] * (host.out - features.window_out)
    largest = _norm(whole).max(axis=-1, keepdims=True)
    error = mass * _norm(host.out - features.window_out)
    return _log2(error / jnp.where(largest > 0, largest, 1.0))


def _structural(features: Features) -> dict[str, jax.Array | float]:
    kv_heads, heads = features.num_kv_heads, features.q.shape[1]
    head = jnp.arange(heads)
    group = heads // kv_heads
    return {
        "layer": features.layer / features.layout.num_layers,
        "kv_head": head // group / kv_heads,
        "head_in_group": head % group / group,
        "host_tokens": jnp.log2(1.0 + features.host_tokens)[:, None],
        "run_tokens": jnp.log2(1.0 * run_blocks(features.capacity_blocks) * BLOCK_TOKENS),
    }


def _kv_distribution(features: Features, host: _Host) -> dict[str, jax.Array]:
    exists = ~jnp.isneginf(host.log_weight)[:, None]
    count = jnp.maximum(exists.sum(axis=-1), 1)

    def mean(x: jax.Array) -> jax.Array:
        return jnp.where(exists, x, 0.0).sum(axis=-1) / count

    def statistics(i: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        x = jnp.where(
            exists[..., None], _sketch(features).runs[:, :, :, i].astype(jnp.float32), 0.0
        )
        norm = _norm(x)
        typical = jnp.maximum(mean(norm), _LEAST)
        deviation = jnp.sqrt(mean((norm - typical[..., None]) ** 2)) / typical
        coherence = _norm(x.sum(axis=2) / count[..., None]) / typical
        return typical, deviation, coherence, norm.max(axis=-1) / typical

    key, key_deviation, key_coherence, _ = statistics(0)
    value, _, value_coherence, value_peak = statistics(1)
    of_kv_heads = {
        "key_norm": _log2(key),
        "key_norm_deviation": key_deviation,
        "value_norm": _log2(value),
        "value_norm_peak": value_peak,
        "key_coherence": key_coherence,
        "value_coherence": value_coherence,
    }
    group = features.q.shape[1] // features.num_kv_heads
    return {name: jnp.repeat(x, group, axis=1) for name, x in of_kv_heads.items()}


def _window_scores(features: Features) -> jax.Array:
    """Scores of the window's slots, `[B, N, W]`; minus infinity for those that hold no token."""
    exists = (features.window_positions >= 0)[:, None]
    # A slot that holds no token may hold anything.
    keys = jnp.where(exists[..., None], features.window_k.astype(jnp.float32), 0.0)
    scores = jnp.einsum("bkgh,bkwh->bkgw", _grouped(features), keys, precision="highest")
    scores = (scores * features.scale).reshape(*features.window_lse.shape, -1)
    return jnp.where(exists, scores, -jnp.inf)


def _qk_interaction(
    features: Features, host: _Host, window_scores: jax.Array
) -> dict[str, jax.Array]:
    exists = ~jnp.isneginf(host.log_weight)[:, None]
    count = jnp.maximum(exists.sum(axis=-1), 1)
    window = features.window_lse

    def mean(x: jax.Array) -> jax.Array:
        return jnp.where(exists, x, 0.0).sum(axis=-1) / count

    def peak(x: jax.Array) -> jax.Array:
        largest = jnp.where(exists, x, -jnp.inf).max(axis=-1)
        return jnp.where(jnp.isneginf(largest), 0.0, largest)

    def above(bounds: jax.Array, limit: jax.Array) -> jax.Array:
        return jnp.log2(1.0 + (exists & (bounds > limit[..., None])).sum(axis=-1))

    weighted = host.bounds + host.log_weight[:, None]
    bound_peak, bound_mean = peak(host.bounds), mean(host.bounds)
    bound_deviation = jnp.sqrt(mean((host.bounds - bound_mean[..., None]) ** 2))
    score_mean = mean(host.scores)
    entropy = -(host.share * jnp.log2(jnp.maximum(host.share, 1e-30))).sum(axis=-1)
    bits = jnp.where(exists, host.log_weight[:, None], 0.0) / jnp.log(2.0)
    return {
        "score_peak": _odds(peak(host.scores) - window),
        "score_mean": _odds(score_mean - window),
        "score_deviation": jnp.sqrt(mean((host.scores - score_mean[..., None]) ** 2)),
        "host_odds": _odds(host.lse - window),
        "bound_peak": _odds(bound_peak - window),
        "bound_range": bound_peak - bound_mean,
        "entropy_tokens": entropy + (host.share * bits).sum(axis=-1),
        "participation_runs": -_log2((host.share**2).sum(axis=-1)),
        "share_peak": host.share.max(axis=-1),
        "bounds_above_1_percent": above(weighted, window + jnp.log(0.01)),
        "bounds_above_10_percent": above(weighted, window + jnp.log(0.1)),
        "bounds_above_window": above(host.bounds, window),
        "bounds_above_window_peak": above(host.bounds, window_scores.max(axis=-1)),
        "bounds_within_1_of_peak": above(host.bounds, bound_peak - 1.0),
        "bounds_within_4_of_peak": above(host.bounds, bound_peak - 4.0),
        "bound_deviation": bound_deviation,
        "bound_peak_deviations": (bound_peak - bound_mean)
        / jnp.maximum(bound_deviation, _LEAST_DEVIATION),
        "query_norm": _log2(features.scale * _norm(features.q)),
    }


def _output_contribution(
    features: Features, host: _Host, mass: jax.Array, error: jax.Array, scores: jax.Array
) -> dict[str, jax.Array]:
    position = features.window_positions[:, None]
    newest = position.max(axis=-1, keepdims=True)

    def odds(slots: jax.Array) -> jax.Array:
        """Log of a part's share of the window's mass."""
        part = jax.nn.logsumexp(jnp.where(slots, scores, -jnp.inf), axis=-1)
        return _odds(part - features.window_lse)

    out_norm = _norm(features.window_out)
    largest = out_norm.max(axis=-1, keepdims=True)
    return {
        "window_error": error,
        "host_share": mass,
        "out_cosine": _cosine(host.out, features.window_out),
        "out_norm": _log2(out_norm / jnp.where(largest > 0, largest, 1.0)),
        "sink_odds": odds((position >= 0) & (position < features.layout.sink_tokens)),
        "newest_odds": odds((position >= 0) & (position > newest - _NEWEST_TOKENS)),
        "window_peak_odds": _odds(scores.max(axis=-1) - features.window_lse),
    }


def _query_dynamics(features: Features) -> dict[str, jax.Array]:
    sketch = _sketch(features)
    before = features.window_positions.max(axis=-1) - 1
    slot = (before % 2)[:, None]
    known = jnp.take_along_axis(sketch.previous_position, slot, axis=1)[:, 0] == before
    known = (known & (before >= 0))[:, None]
    previous = jnp.take_along_axis(sketch.previous_q, slot[..., None, None], axis=1)[:, 0]
    lse = jnp.take_along_axis(sketch.previous_lse, slot[..., None], axis=1)[:, 0]
    change = _log2(_norm(features.q)) - _log2(_norm(previous))
    return {
        "query_cosine": jnp.where(known, _cosine(features.q, previous), 0.0),
        "query_norm_change": jnp.where(known, change, 0.0),
        "window_lse_change": jnp.where(known, _odds(features.window_lse - lse), 0.0),
        "probe_cosine": jnp.where(_probed(features), _cosine(features.q, sketch.probe_q), 0.0),
        "has_previous": known.astype(jnp.float32),
    }


def _prefill_budgets(features: Features) -> dict[str, jax.Array]:
    sketch, probed = _sketch(features), _probed(features)
    since = features.window_positions.max(axis=-1) - sketch.probe_position
    age = jnp.log2(1.0 + jnp.maximum(since, 0))[:, None]
    values = jnp.where(probed[..., None], sketch.probes, 0.0)
    return {
        **{f"probe_{name}": values[..., i] for i, name in enumerate(PROBES)},
        "tokens_since_probe": jnp.where(probed, age, 0.0),
    }


def _cross_head(features: Features, mass: jax.Array, error: jax.Array) -> dict[str, jax.Array]:
    group = features.q.shape[1] // features.num_kv_heads
    probe = jnp.where(_probed(features), _sketch(features).probes[..., 0], 0.0)

    def by_group(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], features.num_kv_heads, group)

    def spread(x: jax.Array) -> jax.Array:
        return jnp.repeat(x, group, axis=1)

    return {
        "group_error_mean": spread(by_group(error).mean(axis=-1)),
        "group_error_peak": spread(by_group(error).max(axis=-1)),
        "layer_error_mean": error.mean(axis=-1, keepdims=True),
        "layer_error_peak": error.max(axis=-1, keepdims=True),
        "group_share_mean": spread(by_group(mass).mean(axis=-1)),
        "group_probe_error_peak": spread(by_group(probe).max(axis=-1)),
    }


def _sketch(features: Features) -> Sketch:
    if features.sketch is None:
        raise ConfigError(
            "expected a cache that keeps a sketch, on one device, got none; allocate it with "
            "model.config.kv_layout(..., sketch=True)"
        )
    return features.sketch


def _probed(features: Features) -> jax.Array:
    return (_sketch(features).probe_position >= 0)[:, None]


def _grouped(features: Features) -> jax.Array:
    batch, heads, head_dim = features.q.shape
    kv_heads = features.num_kv_heads
    return features.q.reshape(batch, kv_heads, heads // kv_heads, head_dim)


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt((x * x).sum(axis=-1))


def _cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    return (x * y).sum(axis=-1) / jnp.maximum(_norm(x) * _norm(y), _LEAST)


def _log2(x: jax.Array) -> jax.Array:
    return jnp.log2(x + _LEAST)


def _odds(x: jax.Array) -> jax.Array:
    """Bounds a difference of logarithms, one of which may be of nothing; NaN stays NaN."""
    return jnp.clip(x, -_LARGEST, _LARGEST)
