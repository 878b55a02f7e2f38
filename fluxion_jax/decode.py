"""The compiled decode loop: a chunk of steps in one program, for generating and for scoring.

Generating and teacher-forcing are the same loop: a forced token replaces the sampled one. The loop
stops by itself on an error or when every row has finished; a row that stops takes no further part.
Axes: B batch, S steps of a chunk, L global layers, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

import host_ops
from fluxion_jax.attention import Execution, LayerStats
from fluxion_jax.cache.host_kv import HostKV
from fluxion_jax.cache.layout import BLOCK_TOKENS, host_tokens
from fluxion_jax.jitting import jit
from fluxion_jax.policy.protocol import Policy
from fluxion_jax.policy.split import Split
from fluxion_jax.sampling import Sampling, sample

NO_TOKEN = -1


class Model(Protocol):
    """What a model needs in order to be prefilled and decoded; `models.Decoder` is one.

    Attributes:
      config: with `vocab_size` and, where a cache is to be allocated, `kv_layout`; see
        `models.ModelConfig`.
    """

    config: Any

    def prefill_chunk(
        self, tokens: jax.Array, count: jax.Array, cache: HostKV, *, execution: Execution
    ) -> tuple[jax.Array, HostKV]:
        """See `Decoder.prefill_chunk`."""
        ...

    def decode_step(
        self,
        tokens: jax.Array,
        cache: HostKV,
        policy: Policy,
        *,
        split: Split,
        execution: Execution,
        return_selection: bool = False,
    ) -> tuple[jax.Array, HostKV, LayerStats | None]:
        """See `Decoder.decode_step`."""
        ...


class LayerTotals(NamedTuple):
    """Sums over the steps of a chunk, per global layer; see `LayerStats` for the terms.

    Attributes:
      host_blocks: int32 `[L]`.
      device_blocks: int32 `[L]`.
      host_units: int32 `[L]`.
      device_units: int32 `[L]`.
      clipped: int32 `[L]`, heads whose budget was cut to what the host held.
      host_times_s: float32 `[L, 9]`, in the order of `host_ops.TIMES`.
      cached_blocks: int32 scalar, host blocks of one layer that could have been read.
      recall: float32 `[L]`, summed over steps of the mean over rows and heads; NaN if not measured.
      output_error: float32 `[L]`, likewise.
    """

    host_blocks: jax.Array
    device_blocks: jax.Array
    host_units: jax.Array
    device_units: jax.Array
    clipped: jax.Array
    host_times_s: jax.Array
    cached_blocks: jax.Array
    recall: jax.Array
    output_error: jax.Array


class Steps(NamedTuple):
    """What a chunk of steps brought.

    Attributes:
      tokens: int32 `[B, S]`, the tokens behind those that were fed; -1 where there is none.
      log_probs: float32 `[B, S]`, natural log of the probability of each of them.
      likeliest: int32 `[B, S]`, the model's most likely token at each step; -1 where none.
      distributions: float32 `[B, S, V]`, log-probabilities of all tokens; `V` is 0 unless measured.
      granularity: int32 `[B, S, L, K]`, tokens of a unit, as planned; `L` is 0 unless recorded.
      budget_tokens: int32 `[B, S, L, N]`, likewise.
      num_steps: int32 scalar, steps that succeeded.
      next_tokens: int32 `[B]`, the tokens to feed next.
      finished: bool `[B]`.
      totals: sums over the steps.
    """

    tokens: jax.Array
    log_probs: jax.Array
    likeliest: jax.Array
    distributions: jax.Array
    granularity: jax.Array
    budget_tokens: jax.Array
    num_steps: jax.Array
    next_tokens: jax.Array
    finished: jax.Array
    totals: LayerTotals


class _Carry(NamedTuple):
    cache: HostKV
    steps: Steps


def _decode_chunk(
    graph: Any,
    params: Any,
    cache: HostKV,
    tokens: jax.Array,
    finished: jax.Array,
    forced: jax.Array,
    max_steps: jax.Array,
    stop_tokens: jax.Array,
    key: jax.Array,
    policy: Policy,
    split: Split,
    sampling: Sampling,
    execution: Execution,
) -> tuple[HostKV, Steps]:
    """Runs up to `max_steps` decode steps.

    Args:
      graph: static part of the model, from `nnx.split`.
      params: its arrays.
      cache: the cache; consumed.
      tokens: int32 `[B]`, the tokens to feed first.
      finished: bool `[B]`, rows that take no part.
      forced: int32 `[B, S]`, tokens that replace the sampled ones; -1 to sample.
      max_steps: int32 scalar, at most `S`.
      stop_tokens: int32 `[X]`, tokens that finish a row.
      key: PRNG key of the generation.
      policy: what each head may read.
      split: who reads it.
      sampling: how tokens are drawn.
      execution: how a step runs.
    """
    model = nnx.merge(graph, params)
    batch, chunk = forced.shape
    was_active = cache.active
    layout = cache.layout
    recorded = execution.record and bool(layout.global_layers)

    def step(carry: _Carry) -> _Carry:
        cache, steps = carry
        running = was_active & ~steps.finished
        before = cache.lengths
        logits, cache, stats = model.decode_step(
            steps.next_tokens,
            cache.replace(active=running),
            policy,
            split=split,
            execution=execution,
        )
        i = steps.num_steps
        drawn = sample(logits, sampling, key, before)
        token = jnp.where(forced[:, i] >= 0, forced[:, i], drawn)
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        log_prob = jnp.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0]
        likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)

        succeeded = cache.status[0] == 0
        shown = running & succeeded
        stopped = (token[:, None] == stop_tokens).any(axis=-1) & (forced[:, i] < 0)

        def put(buffer: jax.Array, value: jax.Array) -> jax.Array:
            taken = shown.reshape(batch, *[1] * (value.ndim - 1))
            return buffer.at[:, i].set(jnp.where(taken, value, buffer[:, i]))

        steps = Steps(
            tokens=put(steps.tokens, token),
            log_probs=put(steps.log_probs, log_prob),
            likeliest=put(steps.likeliest, likeliest),
            distributions=put(steps.distributions, log_probs)
            if execution.measure
            else steps.distributions,
            granularity=put(steps.granularity, jnp.moveaxis(stats.granularity, 0, 1))
            if recorded
            else steps.granularity,
            budget_tokens=put(steps.budget_tokens, jnp.moveaxis(stats.budget_tokens, 0, 1))
            if recorded
            else steps.budget_tokens,
            num_steps=i + succeeded,
            next_tokens=jnp.where(shown, token, steps.next_tokens),
            finished=steps.finished | (shown & stopped),
            # A step that failed is none of `num_steps`, over which means are taken.
            totals=steps.totals
            if stats is None
            else jax.tree.map(
                functools.partial(jnp.where, succeeded),
                _add(steps.totals, stats, running, _cached_blocks(cache, before, running)),
                steps.totals,
            ),
        )
        return _Carry(cache, steps)

    def unfinished(carry: _Carry) -> jax.Array:
        cache, steps = carry
        pending = (was_active & ~steps.finished).any()
        return (steps.num_steps < max_steps) & (cache.status[0] == 0) & pending

    none = jnp.full((batch, chunk), NO_TOKEN, jnp.int32)
    kept = model.config.vocab_size if execution.measure else 0
    layers = len(layout.global_layers) if recorded else 0
    start = Steps(
        tokens=none,
        log_probs=jnp.zeros((batch, chunk), jnp.float32),
        likeliest=none,
        distributions=jnp.zeros((batch, chunk, kept), jnp.float32),
        granularity=jnp.zeros((batch, chunk, layers, layout.num_kv_heads), jnp.int32),
        budget_tokens=jnp.zeros((batch, chunk, layers, layout.num_heads or 0), jnp.int32),
        num_steps=jnp.zeros((), jnp.int32),
        next_tokens=tokens,
        finished=finished,
        totals=_no_totals(len(cache.layout.global_layers), execution),
    )
    cache, steps = jax.lax.while_loop(unfinished, step, _Carry(cache, start))
    return cache.replace(active=was_active), steps


decode_chunk = jit(_decode_chunk, static_argnames=("graph", "execution"))


def _prefill_chunk(
    graph: Any,
    params: Any,
    cache: HostKV,
    tokens: jax.Array,
    count: jax.Array,
    execution: Execution,
) -> tuple[HostKV, jax.Array]:
    """Reads a chunk of prompt tokens `[B, T]`; returns the cache and logits `[B, V]`."""
    count = jnp.where(cache.active, count, 0)
    logits, new = nnx.merge(graph, params).prefill_chunk(tokens, count, cache, execution=execution)
    return new.undo_if_failed(cache), logits


prefill_chunk = jit(_prefill_chunk, static_argnames=("graph", "execution"))


def _no_totals(num_layers: int, execution: Execution) -> LayerTotals:
    count = jnp.zeros((num_layers,), jnp.int32)
    measured = jnp.full((num_layers,), 0.0 if execution.measure else jnp.nan, jnp.float32)
    times = jnp.zeros((num_layers, len(host_ops.TIMES)), jnp.float32)
    cached = jnp.zeros((), jnp.int32)
    return LayerTotals(count, count, count, count, count, times, cached, measured, measured)


def _cached_blocks(cache: HostKV, lengths: jax.Array, running: jax.Array) -> jax.Array:
    blocks = host_tokens(cache.layout, lengths) // BLOCK_TOKENS
    return jnp.where(running, blocks, 0).sum() * cache.layout.num_kv_heads


def _add(
    totals: LayerTotals, stats: LayerStats, running: jax.Array, cached_blocks: jax.Array
) -> LayerTotals:
    rows = running.astype(jnp.float32) / jnp.maximum(running.sum(), 1)

    def mean(measure: jax.Array | None) -> jax.Array | float:
        if measure is None:
            return 0.0
        return (jnp.where(running, measure.mean(axis=-1), 0.0) * rows).sum(axis=-1)

    return LayerTotals(
        host_blocks=totals.host_blocks + stats.host_blocks.sum(axis=(1, 2)),
        device_blocks=totals.device_blocks + stats.device_blocks.sum(axis=(1, 2)),
        host_units=totals.host_units + stats.host_units.sum(axis=(1, 2)),
        device_units=totals.device_units + stats.device_units.sum(axis=(1, 2)),
        clipped=totals.clipped + stats.clipped.sum(axis=1),
        host_times_s=totals.host_times_s + stats.host_times_s,
        cached_blocks=totals.cached_blocks + cached_blocks,
        recall=totals.recall + mean(stats.recall),
        output_error=totals.output_error + mean(stats.output_error),
    )
