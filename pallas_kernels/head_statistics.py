"""What a sample of the host cache and the resident window say of every query head, as numbers.

A sample is a few runs of host tokens: of each a drawn key, its value, and bounds of all its keys.
Attention over the drawn tokens, each weighted by the tokens of its run, estimates attention over
the host; the bounds tell what the sample may have missed. All that needs a pass over the sample is
done here, so that what a policy makes of it are a few operations on numbers of each head.

Axes: B batch, N query heads, K KV heads, G = N // K, M runs, H head size.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.head_statistics_triton import LARGEST_ODDS, head_statistics_triton
from pallas_kernels.registry import Implementation, dispatch


class HeadStatistics(NamedTuple):
    """Numbers of every query head, in the order in which `head_statistics` returns them.

    Notation: `s` the scores of drawn keys, `u` the bounds of runs, both times the scale; `w` the
    logarithm of a run's tokens; `p = exp(s + w - lse)`; only runs that hold tokens count, and the
    largest of none is 0. Logarithms are natural.

    Attributes:
      score_peak: largest `s`.
      score_mean: mean `s`.
      score_deviation: standard deviation of `s`.
      host_lse: `log sum exp(s + w)`, `-inf` for no runs.
      bound_peak: largest `u`.
      bound_mean: mean `u`.
      bound_deviation: standard deviation of `u`.
      entropy_bits: `sum p (w - log p)`, in bits: of the distribution over tokens.
      share_squares: `sum p^2`.
      share_peak: largest `p`.
      above_1_percent: runs with `u + w` above 1 % of the window's mass.
      above_10_percent: above 10 %.
      above_window: runs with `u` above the window's log-sum-exp.
      above_window_peak: above the window's largest score.
      within_1_of_peak: runs with `u` above `bound_peak - 1`.
      within_4_of_peak: above `bound_peak - 4`.
      out_product: `host_out . window_out`, where `host_out = sum p v`.
      host_out_norm: of `host_out`.
      window_out_norm: of `window_out`.
      change_norm: of `host_out - window_out`.
      whole_norm: of the two merged by `host_lse` and the window's.
      window_peak: largest score in the window, `-inf` for no token.
      sink_lse: log-sum-exp of the sinks' scores.
      newest_lse: of the newest tokens'.
      query_norm: of `q`.
      previous_product: `q . previous_q`.
      previous_norm: of `previous_q`.
      probe_product: `q . probe_q`.
      probe_norm: of `probe_q`.
      key_norm: mean norm of the drawn keys, as all that follow the same for all heads of a group.
      key_norm_deviation: standard deviation of these norms.
      mean_key_norm: norm of the mean key.
      value_norm: mean norm of the drawn values.
      value_norm_peak: largest of these norms.
      mean_value_norm: norm of the mean value.
    """

    score_peak: jax.Array
    score_mean: jax.Array
    score_deviation: jax.Array
    host_lse: jax.Array
    bound_peak: jax.Array
    bound_mean: jax.Array
    bound_deviation: jax.Array
    entropy_bits: jax.Array
    share_squares: jax.Array
    share_peak: jax.Array
    above_1_percent: jax.Array
    above_10_percent: jax.Array
    above_window: jax.Array
    above_window_peak: jax.Array
    within_1_of_peak: jax.Array
    within_4_of_peak: jax.Array
    out_product: jax.Array
    host_out_norm: jax.Array
    window_out_norm: jax.Array
    change_norm: jax.Array
    whole_norm: jax.Array
    window_peak: jax.Array
    sink_lse: jax.Array
    newest_lse: jax.Array
    query_norm: jax.Array
    previous_product: jax.Array
    previous_norm: jax.Array
    probe_product: jax.Array
    probe_norm: jax.Array
    key_norm: jax.Array
    key_norm_deviation: jax.Array
    mean_key_norm: jax.Array
    value_norm: jax.Array
    value_norm_peak: jax.Array
    mean_value_norm: jax.Array


def head_statistics(
    q: jax.Array,
    window_out: jax.Array,
    window_lse: jax.Array,
    window_scores: jax.Array,
    newest: jax.Array,
    runs: jax.Array,
    host_tokens: jax.Array,
    previous_q: jax.Array,
    probe_q: jax.Array,
    *,
    scale: float,
    run_tokens: int,
    implementation: Implementation = None,
) -> jax.Array:
    """Looks at the sample, the window and earlier queries with the queries of a step.

    Args:
      q: float32 `[B, N, H]`, not scaled.
      window_out: float32 `[B, N, H]`, attention over the window.
      window_lse: float32 `[B, N]`, its log-sum-exp.
      window_scores: float32 `[B, N, 3]`, see `window_scores`.
      newest: int32 `[B]`, the largest position in the window.
      runs: `[B, K, M, 4, H]`: a drawn key, its value, the negated minimum and the maximum of the
        run's keys. Runs that hold no token may hold anything.
      host_tokens: int32 `[B]`, of which the runs take `run_tokens` each, the last one the rest.
      previous_q: float32 `[B, 2, N, H]`, by the parity of their position; the one counts that is of
        the position before the newest.
      probe_q: float32 `[B, N, H]`.
      scale: factor on the scores.
      run_tokens: tokens of a run.
      implementation: "triton" on a GPU, "xla" everywhere, None for the best available.

    Returns:
      float32 `[B, N, 35]`, the statistics in the order of `HeadStatistics`. Of rows without a token
      in the window only those of the host mean something.
    """
    found: jax.Array = dispatch(
        "head_statistics",
        implementation,
        {"triton": _triton, "xla": _xla},
        q,
        window_out,
        window_lse,
        window_scores,
        newest,
        runs,
        host_tokens,
        previous_q,
        probe_q,
        scale=scale,
        run_tokens=run_tokens,
    )
    return found


def _triton(*operands: jax.Array, **constants: float) -> jax.Array:
    return head_statistics_triton(
        HeadStatistics._fields,
        *operands,  # type: ignore[arg-type]
        **constants,  # type: ignore[arg-type]
    )


def _xla(
    q: jax.Array,
    window_out: jax.Array,
    window_lse: jax.Array,
    window_scores: jax.Array,
    newest: jax.Array,
    runs: jax.Array,
    host_tokens: jax.Array,
    previous_q: jax.Array,
    probe_q: jax.Array,
    *,
    scale: float,
    run_tokens: int,
) -> jax.Array:
    batch, heads, _ = q.shape
    kv_heads, count = runs.shape[1:3]
    group = heads // kv_heads
    grouped = q.reshape(batch, kv_heads, group, -1)

    def by_head(x: jax.Array) -> jax.Array:
        return x.reshape(batch, heads, *x.shape[3:])

    def products(x: jax.Array, rows: jax.Array) -> jax.Array:
        return jnp.einsum("bkgh,bkmh->bkgm", x, rows, precision="highest")

    tokens = jnp.clip(host_tokens[:, None] - jnp.arange(count) * run_tokens, 0, run_tokens)
    exists = tokens > 0
    log_weight = jnp.where(exists, jnp.log(jnp.maximum(tokens, 1).astype(jnp.float32)), -jnp.inf)
    held = jnp.maximum(exists.sum(axis=-1), 1)
    k, v, negated_low, high = (
        # What no block has reached may hold anything, and 0 * NaN is NaN.
        jnp.where(exists[:, None, :, None], runs[:, :, :, i].astype(jnp.float32), 0.0)
        for i in range(4)
    )

    def mean(x: jax.Array) -> jax.Array:
        """Over the runs, the last of three axes."""
        return jnp.where(exists[:, None], x, 0.0).sum(axis=-1) / held[:, None]

    def peak(x: jax.Array) -> jax.Array:
        largest = jnp.where(exists[:, None], x, -jnp.inf).max(axis=-1)
        return jnp.where(jnp.isneginf(largest), 0.0, largest)

    def deviation(x: jax.Array, around: jax.Array) -> jax.Array:
        return jnp.sqrt(mean((x - around[..., None]) ** 2))

    def above(x: jax.Array, limit: jax.Array) -> jax.Array:
        return (exists[:, None] & (x > limit[..., None])).sum(axis=-1).astype(jnp.float32)

    def of_group(x: jax.Array) -> jax.Array:
        return jnp.repeat(x, group, axis=1)

    scores = by_head(products(grouped, k)) * scale
    bounds = products(jnp.maximum(grouped, 0), high)
    bounds = by_head(bounds + products(jnp.maximum(-grouped, 0), negated_low)) * scale
    weighted = scores + log_weight[:, None]
    host_lse = jax.nn.logsumexp(weighted, axis=-1)
    share = jnp.exp(weighted - jnp.where(jnp.isneginf(host_lse), 0.0, host_lse)[..., None])
    host_out = by_head(
        jnp.einsum("bkgm,bkmh->bkgh", share.reshape(*grouped.shape[:3], -1), v, precision="highest")
    )
    nats = -(share * jnp.log(jnp.maximum(share, 1e-30))).sum(axis=-1)
    nats += (share * jnp.where(exists, log_weight, 0.0)[:, None]).sum(axis=-1)

    window_peak, sink_lse, newest_lse = jnp.moveaxis(window_scores, -1, 0)
    mass = jax.nn.sigmoid(jnp.clip(host_lse - window_lse, -LARGEST_ODDS, LARGEST_ODDS))
    change = host_out - window_out
    parity = (newest + 1) & 1
    previous = jnp.take_along_axis(previous_q, parity[:, None, None, None], axis=1)[:, 0]
    bound_peak, bound_mean, score_mean = peak(bounds), mean(bounds), mean(scores)
    key_norms, value_norms = _norm(k), _norm(v)
    key_norm, value_norm = mean(key_norms), mean(value_norms)
    means = [_norm(x.sum(axis=2) / held[:, None, None]) for x in (k, v)]
    weighted_bounds = bounds + log_weight[:, None]
    found = HeadStatistics(
        score_peak=peak(scores),
        score_mean=score_mean,
        score_deviation=deviation(scores, score_mean),
        host_lse=host_lse,
        bound_peak=bound_peak,
        bound_mean=bound_mean,
        bound_deviation=deviation(bounds, bound_mean),
        entropy_bits=nats / jnp.log(2.0),
        share_squares=(share**2).sum(axis=-1),
        share_peak=share.max(axis=-1),
        above_1_percent=above(weighted_bounds, window_lse + jnp.log(0.01)),
        above_10_percent=above(weighted_bounds, window_lse + jnp.log(0.1)),
        above_window=above(bounds, window_lse),
        above_window_peak=above(bounds, window_peak),
        within_1_of_peak=above(bounds, bound_peak - 1.0),
        within_4_of_peak=above(bounds, bound_peak - 4.0),
        out_product=(host_out * window_out).sum(axis=-1),
        host_out_norm=_norm(host_out),
        window_out_norm=_norm(window_out),
        change_norm=_norm(change),
        whole_norm=_norm(window_out + mass[..., None] * change),
        window_peak=window_peak,
        sink_lse=sink_lse,
        newest_lse=newest_lse,
        query_norm=_norm(q),
        previous_product=(q * previous).sum(axis=-1),
        previous_norm=_norm(previous),
        probe_product=(q * probe_q).sum(axis=-1),
        probe_norm=_norm(probe_q),
        key_norm=of_group(key_norm),
        key_norm_deviation=of_group(deviation(key_norms, key_norm)),
        mean_key_norm=of_group(means[0]),
        value_norm=of_group(value_norm),
        value_norm_peak=of_group(value_norms.max(axis=-1)),
        mean_value_norm=of_group(means[1]),
    )
    return jnp.stack(found, axis=-1)


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt((x * x).sum(axis=-1))
