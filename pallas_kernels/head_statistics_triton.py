"""The statistics of `head_statistics` in two Pallas kernels, for a GPU.

XLA takes about thirty for them, each of which takes longer to start than to run. The first reads
keys, values and bounds, a tile of runs in each program, for all heads of the group; the second has
a program for each head and only numbers to read.

Axes: B batch, N query heads, K KV heads, G = N // K, M runs, H head size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.compat import silence_triton_deprecation
from pallas_kernels.exact_products import PARTS, exact_product, largest_part, parts_for
from pallas_kernels.registry import require_gpu

LARGEST_ODDS = 30.0
"""Odds of a part that is empty, and of one that is everything, must stay numbers."""

TILE = 64
"""Runs of a program."""

# Of a matrix on the tensor cores; heads that are missing are zeros.
_LEAST_ROWS = 16

_LOG_1_PERCENT = math.log(0.01)
_LOG_10_PERCENT = math.log(0.1)
_MINUS_INFINITY = float("-inf")


def head_statistics_triton(
    names: Sequence[str],
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
    interpret: bool = False,
) -> jax.Array:
    """Computes the statistics.

    Args:
      names: of the statistics wanted, in their order.
      q: see `head_statistics`, as for all that follow.
      window_out: float32 `[B, N, H]`.
      window_lse: float32 `[B, N]`.
      window_scores: float32 `[B, N, 3]`.
      newest: int32 `[B]`.
      runs: `[B, K, M, 4, H]`.
      host_tokens: int32 `[B]`.
      previous_q: float32 `[B, 2, N, H]`.
      probe_q: float32 `[B, N, H]`.
      scale: factor on the scores.
      run_tokens: tokens of a run.
      interpret: run on any platform, slowly; for tests.

    Returns:
      float32 `[B, N, len(names)]`.

    Raises:
      UnsupportedImplementationError: not on a GPU.
    """
    require_gpu(interpret)
    batch, heads, head_dim = q.shape
    kv_heads, num_runs = runs.shape[1:3]
    tasks, group = batch * kv_heads, heads // kv_heads
    tiles = pl.cdiv(num_runs, TILE)
    q = q.astype(jnp.float32).reshape(tasks, group, head_dim)
    silence_triton_deprecation()

    def row(program: Any, *_: Any) -> tuple[Any]:
        return (program // kv_heads,)

    def task(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda t, *_: (t,) + (0,) * len(shape))

    number = pl.BlockSpec((1,), row)

    def of_tile(*shape: int) -> pl.BlockSpec:
        """Part of an array with an axis of tiles."""
        return pl.BlockSpec((None, None, *shape), lambda t, _, tile: (t, tile) + (0,) * len(shape))

    floats = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    # By tile: scores and bounds of its runs, norms of its keys and values, the state of attention
    # over it without its division, the sums of its keys and values.
    partials = (
        floats((tasks, tiles, group, 2, TILE)),
        floats((tasks, tiles, 2, TILE)),
        floats((tasks, tiles, group)),
        floats((tasks, tiles, group, head_dim)),
        floats((tasks, tiles, 2, head_dim)),
    )
    found = pl.pallas_call(
        functools.partial(_read_tile, scale=scale, run_tokens=run_tokens, interpret=interpret),
        grid=(tasks, 2, tiles),
        in_specs=[task(group, head_dim), task(num_runs, 4, head_dim), number],
        out_specs=[of_tile(*x.shape[2:]) for x in partials],
        out_shape=partials,
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="read_sketch",
    )(
        q,
        runs.reshape(tasks, num_runs, 4, head_dim),
        host_tokens.astype(jnp.int32),
    )

    def of_head(*shape: int) -> pl.BlockSpec:
        """Part of an array `[tasks, G, ...]`."""
        return pl.BlockSpec((None, None, *shape), lambda t, g: (t, g) + (0,) * len(shape))

    lse = pl.BlockSpec((None, 1), lambda t, g: (t, g))
    previous = pl.BlockSpec(
        (None, 2, None, None, head_dim), lambda t, g: (t // kv_heads, 0, t % kv_heads, g, 0)
    )
    statistics: jax.Array = pl.pallas_call(
        functools.partial(_conclude, names=tuple(names), num_runs=num_runs, run_tokens=run_tokens),
        grid=(tasks, group),
        in_specs=[
            of_head(head_dim),
            of_head(head_dim),
            lse,
            of_head(3),
            number,
            previous,
            number,
            of_head(head_dim),
            pl.BlockSpec((None, tiles, None, 2, TILE), lambda t, g: (t, 0, g, 0, 0)),
            task(tiles, 2, TILE),
            pl.BlockSpec((None, tiles, None), lambda t, g: (t, 0, g)),
            pl.BlockSpec((None, tiles, None, head_dim), lambda t, g: (t, 0, g, 0)),
            task(tiles, 2, head_dim),
        ],
        out_specs=of_head(len(names)),
        out_shape=floats((tasks, group, len(names))),
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="head_statistics",
    )(
        q,
        window_out.astype(jnp.float32).reshape(tasks, group, head_dim),
        window_lse.reshape(tasks, group),
        window_scores.reshape(tasks, group, 3),
        host_tokens.astype(jnp.int32),
        previous_q.reshape(batch, 2, kv_heads, group, head_dim),
        newest.astype(jnp.int32),
        probe_q.reshape(tasks, group, head_dim),
        *found,
    )
    return statistics.reshape(batch, heads, len(names))


def _channels(head_dim: int) -> tuple[jax.Array, jax.Array]:
    channel = jnp.arange(pl.next_power_of_2(head_dim), dtype=jnp.int32)
    return channel, channel < head_dim


def _grid_of(rows: jax.Array, columns: jax.Array) -> tuple[jax.Array, jax.Array]:
    shape = (rows.size, columns.size)
    return jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(columns[None, :], shape)


def _log_sum_exp(x: jax.Array) -> jax.Array:
    largest = jnp.max(x)
    finite = jnp.where(largest == _MINUS_INFINITY, jnp.zeros_like(largest), largest)
    return finite + jnp.log(jnp.sum(jnp.exp(x - finite)))


def _tokens_of(
    run: jax.Array, host_tokens: jax.Array, num_runs: int, run_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """Tokens of runs, and whether they hold any."""
    tokens = jnp.clip(host_tokens - run * run_tokens, 0, run_tokens)
    return tokens, (tokens > 0) & (run < num_runs)


def _log_weight(tokens: jax.Array, held: jax.Array) -> jax.Array:
    return jnp.where(held, jnp.log(jnp.maximum(tokens, 1).astype(jnp.float32)), _MINUS_INFINITY)


def _read_tile(
    q_ref: Any,
    runs_ref: Any,
    host_tokens_ref: Any,
    scores_ref: Any,
    norms_ref: Any,
    largest_ref: Any,
    out_ref: Any,
    sums_ref: Any,
    *,
    scale: float,
    run_tokens: int,
    interpret: bool,
) -> None:
    """Scores of a tile for all heads of the group, and sums over it."""
    group, head_dim = q_ref.shape
    num_runs = runs_ref.shape[0]
    channel, in_head = _channels(head_dim)
    lane = jnp.arange(TILE, dtype=jnp.int32)
    head = jnp.arange(max(_LEAST_ROWS, pl.next_power_of_2(group)), dtype=jnp.int32)
    by_channel, by_lane = _grid_of(head, channel), _grid_of(head, lane)
    exists = head < group
    of_bounds, tile = pl.program_id(1) > 0, pl.program_id(2)
    in_group = exists[:, None] & in_head[None, :]
    dtype = runs_ref.dtype
    # Not by reductions, which would take longer than everything else.
    product = functools.partial(exact_product, interpret=interpret)

    queries = pltriton.load(q_ref.at[by_channel], mask=in_group, other=0.0)

    def with_queries(queries: jax.Array, rows: jax.Array) -> jax.Array:
        """Products of queries with rows of channels."""
        nothing = jnp.zeros(by_lane[0].shape, jnp.float32)
        if dtype != jnp.bfloat16:
            return nothing + product([queries], rows, 1)

        def add(_: jax.Array, so_far: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            rest, scores = so_far
            part, rest = largest_part(rest)
            return rest, scores + product([part], rows, 1)

        # In a loop, or all parts would take up registers at once.
        return jax.lax.fori_loop(0, PARTS, add, (queries, nothing))[1]

    run = tile * TILE + lane
    tokens, held = _tokens_of(run, host_tokens_ref[0], num_runs, run_tokens)
    at = _grid_of(run, channel)
    rows_held = held[:, None] & in_head[None, :]

    def load(i: int) -> jax.Array:
        where = (at[0], jnp.full_like(at[0], i), at[1])
        return pltriton.load(runs_ref.at[where], mask=rows_held, other=0.0)

    def store_scores(scores: jax.Array, i: int) -> None:
        where = (by_lane[0], jnp.full_like(by_lane[0], i), by_lane[1])
        pltriton.store(scores_ref.at[where], scores * scale, mask=by_lane[0] < group)

    # Bounds apart: programs that hold less at once run beside each other.
    @pl.when(~of_bounds)
    def _() -> None:
        log_weight = _log_weight(tokens, held)
        k, v = load(0), load(1)
        ones = [jnp.ones(by_lane[0].shape, dtype if dtype == jnp.bfloat16 else jnp.float32)]
        for i, rows in enumerate((k, v)):
            squares = rows.astype(jnp.float32) * rows.astype(jnp.float32)
            pltriton.store(norms_ref.at[i, lane], jnp.sqrt(jnp.sum(squares, axis=1)))
            # All rows of this product are the same.
            sums = jnp.max(product(ones, rows, 0), axis=0)
            pltriton.store(sums_ref.at[i, channel], sums, mask=in_head)
        scores = with_queries(queries, k)
        store_scores(scores, 0)
        weighted = scores * scale + log_weight[None, :]
        largest = jnp.max(weighted, axis=1)
        finite = jnp.where(largest == _MINUS_INFINITY, 0.0, largest)
        pltriton.store(largest_ref.at[head], largest, mask=exists)
        out = product(parts_for(jnp.exp(weighted - finite[:, None]), dtype), v, 0)
        pltriton.store(out_ref.at[by_channel], out, mask=in_group)

    @pl.when(of_bounds)
    def _() -> None:
        upper = with_queries(jnp.maximum(queries, 0.0), load(3))
        store_scores(upper + with_queries(jnp.maximum(-queries, 0.0), load(2)), 1)


def _conclude(
    q_ref: Any,
    window_out_ref: Any,
    window_lse_ref: Any,
    window_scores_ref: Any,
    host_tokens_ref: Any,
    previous_ref: Any,
    newest_ref: Any,
    probe_ref: Any,
    scores_ref: Any,
    norms_ref: Any,
    largest_ref: Any,
    out_ref: Any,
    sums_ref: Any,
    statistics_ref: Any,
    *,
    names: tuple[str, ...],
    num_runs: int,
    run_tokens: int,
) -> None:
    """What the tiles say together, for one head."""
    tiles, head_dim = out_ref.shape
    channel, in_head = _channels(head_dim)
    tile = jnp.arange(pl.next_power_of_2(tiles), dtype=jnp.int32)
    run = jnp.arange(tile.size * TILE, dtype=jnp.int32)
    tokens, exists = _tokens_of(run, host_tokens_ref[0], num_runs, run_tokens)
    log_weight = _log_weight(tokens, exists)
    held = jnp.maximum(jnp.sum(exists.astype(jnp.float32)), 1.0)

    def of_runs(ref: Any, *index: Any) -> jax.Array:
        """A number of each run, 0 for those that do not exist."""
        where = (run // TILE, *(jnp.full_like(run, i) for i in index), run % TILE)
        return pltriton.load(ref.at[where], mask=exists, other=0.0)

    def of_tiles(ref: Any, *index: int) -> jax.Array:
        """The sum over tiles of vectors of channels."""
        at = _grid_of(tile, channel)
        where = (at[0], *(jnp.full_like(at[0], i) for i in index), at[1])
        return pltriton.load(ref.at[where], mask=(at[0] < tiles) & in_head[None, :], other=0.0)

    def vector(ref: Any) -> jax.Array:
        return pltriton.load(ref, mask=in_head, other=0.0)

    def mean(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(exists, x, 0.0)) / held

    def peak(x: jax.Array) -> jax.Array:
        largest = jnp.max(jnp.where(exists, x, _MINUS_INFINITY))
        return jnp.where(largest == _MINUS_INFINITY, jnp.float32(0.0), largest)

    def deviation(x: jax.Array, around: jax.Array) -> jax.Array:
        return jnp.sqrt(mean((x - around) * (x - around)))

    def above(x: jax.Array, limit: jax.Array) -> jax.Array:
        return jnp.sum((exists & (x > limit)).astype(jnp.float32))

    def norm(x: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.sum(x * x))

    scores, bounds = of_runs(scores_ref, 0), of_runs(scores_ref, 1)
    weighted = scores + log_weight
    host_lse = _log_sum_exp(weighted)
    nothing = host_lse == _MINUS_INFINITY
    finite_lse = jnp.where(nothing, jnp.float32(0.0), host_lse)
    share = jnp.exp(weighted - finite_lse)
    # A run's logarithm of tokens less that of its share, which is exact where the share underflows.
    surprise = jnp.where(exists, finite_lse - scores, 0.0)

    tile_largest = pltriton.load(largest_ref.at[tile], mask=tile < tiles, other=_MINUS_INFINITY)
    weight = jnp.exp(tile_largest - finite_lse)
    host_out = jnp.sum(weight[:, None] * of_tiles(out_ref), axis=0)

    q, window_out, probe = (vector(ref.at[channel]) for ref in (q_ref, window_out_ref, probe_ref))
    previous = vector(previous_ref.at[(newest_ref[0] + 1) & 1, channel])
    window_lse, window_peak = window_lse_ref[0], window_scores_ref[0]
    odds = jnp.clip(host_lse - window_lse, -LARGEST_ODDS, LARGEST_ODDS)
    mass = 1.0 / (1.0 + jnp.exp(-odds))
    change = host_out - window_out
    score_mean, bound_mean, bound_peak = mean(scores), mean(bounds), peak(bounds)
    key_norms, value_norms = of_runs(norms_ref, 0), of_runs(norms_ref, 1)
    key_norm = mean(key_norms)
    found = {
        "score_peak": peak(scores),
        "score_mean": score_mean,
        "score_deviation": deviation(scores, score_mean),
        "host_lse": host_lse,
        "bound_peak": bound_peak,
        "bound_mean": bound_mean,
        "bound_deviation": deviation(bounds, bound_mean),
        "entropy_bits": jnp.sum(share * surprise) / math.log(2.0),
        "share_squares": jnp.sum(share * share),
        "share_peak": jnp.max(share),
        "above_1_percent": above(bounds + log_weight, window_lse + _LOG_1_PERCENT),
        "above_10_percent": above(bounds + log_weight, window_lse + _LOG_10_PERCENT),
        "above_window": above(bounds, window_lse),
        "above_window_peak": above(bounds, window_peak),
        "within_1_of_peak": above(bounds, bound_peak - 1.0),
        "within_4_of_peak": above(bounds, bound_peak - 4.0),
        "out_product": jnp.sum(host_out * window_out),
        "host_out_norm": norm(host_out),
        "window_out_norm": norm(window_out),
        "change_norm": norm(change),
        "whole_norm": norm(window_out + mass * change),
        "window_peak": window_peak,
        "sink_lse": window_scores_ref[1],
        "newest_lse": window_scores_ref[2],
        "query_norm": norm(q),
        "previous_product": jnp.sum(q * previous),
        "previous_norm": norm(previous),
        "probe_product": jnp.sum(q * probe),
        "probe_norm": norm(probe),
        "key_norm": key_norm,
        "key_norm_deviation": deviation(key_norms, key_norm),
        "mean_key_norm": norm(jnp.sum(of_tiles(sums_ref, 0), axis=0) / held),
        "value_norm": mean(value_norms),
        "value_norm_peak": jnp.max(value_norms),
        "mean_value_norm": norm(jnp.sum(of_tiles(sums_ref, 1), axis=0) / held),
    }
    for i, name in enumerate(names):
        statistics_ref[i] = found[name]
