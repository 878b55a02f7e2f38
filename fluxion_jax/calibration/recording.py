"""Records decode steps of texts: features as a policy sees them, and what heads really needed.

The texts of a batch are read once on the device and then decoded under full attention, all steps in
one compiled call. Features come from the functions that the product's step calls, budgets from
those of the oracle, so a predictor learns to plan as `oracle:TOLERANCE` does.

Axes: B texts, T steps, L global layers, N query heads, F features, E errors, D granularities, S
prompt tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fluxion_jax.cache.layout import BLOCK_TOKENS, KVLayout, host_tokens
from fluxion_jax.calibration.texts import CalibrationText
from fluxion_jax.decode import NO_TOKEN
from fluxion_jax.evaluation import branch_attention, branch_sketch
from fluxion_jax.evaluation.branch_attention import Past, Prefix
from fluxion_jax.evaluation.branch_plans import Layer, features_of
from fluxion_jax.evaluation.branch_sketch import Before, Sketched
from fluxion_jax.evaluation.branches import attend_recent, read_prefix
from fluxion_jax.evaluation.oracle import error_curves, smallest_budgets
from fluxion_jax.policy.features import NUM_FEATURES, head_features

# Prompts of similar length share a compiled program.
_PADDED_TOKENS = 1024
_GRANULARITIES = 4


class Recorded(NamedTuple):
    """Steps of texts; those at which a text does not run are unspecified.

    Attributes:
      features: float32 `[T, B, L, N, F]`.
      budget_tokens: int32 `[T, B, E, D, L, N]`, smallest budgets; 0 where the window suffices.
      window_error: float32 `[T, B, L, N]`, with the window alone.
      host_tokens: int32 `[T, B]`.
      running: bool `[T, B]`.
    """

    features: Any
    budget_tokens: Any
    window_error: Any
    host_tokens: Any
    running: Any


def record(
    model: nnx.Module,
    texts: Sequence[CalibrationText],
    *,
    slots: int,
    errors: Sequence[float],
    layout: KVLayout,
    capacity_tokens: int,
    chunk_tokens: int,
    stop_tokens: Sequence[int],
) -> Recorded:
    """Records the steps of a batch of texts.

    Args:
      model: a `Decoder`.
      texts: of like length.
      slots: steps that there is room for, at least those of every text.
      errors: for which smallest budgets are found, ascending.
      layout: of the cache, with a sketch.
      capacity_tokens: of the cache, on which the runs of a sketch depend.
      chunk_tokens: tokens that one call of the product would prefill.
      stop_tokens: end an answer.

    Returns:
      NumPy arrays; T may be less than `slots`.
    """
    lengths = np.asarray([len(text.prompt) - 1 for text in texts], np.int32)
    padded = -(-int(lengths.max()) // _PADDED_TOKENS) * _PADDED_TOKENS
    ids = np.zeros((len(texts), branch_attention.padded_tokens(layout, padded)), np.int32)
    forced = np.full((len(texts), slots), NO_TOKEN, np.int32)
    for row, text in enumerate(texts):
        ids[row, : lengths[row]] = text.prompt[:-1]
        forced[row, : len(text.following)] = text.following
    graph, params = nnx.split(model)
    capacity_blocks = layout.host_blocks(capacity_tokens)
    ages = np.asarray([text.age_tokens for text in texts], np.int32)
    prefix = read_prefix(
        graph,
        params,
        jnp.asarray(ids),
        jnp.asarray(lengths),
        layout,
        capacity_blocks,
        chunk_tokens,
        jnp.asarray(np.maximum(lengths - ages, 1)),
    )
    recorded, count = _decode(
        graph,
        params,
        prefix,
        jnp.asarray(lengths),
        jnp.asarray([text.prompt[-1] for text in texts], jnp.int32),
        jnp.asarray(forced),
        jnp.asarray([text.steps for text in texts], jnp.int32),
        jnp.asarray(stop_tokens, jnp.int32),
        jnp.asarray(errors, jnp.float32),
        layout,
        capacity_blocks,
    )
    steps = int(count)
    return Recorded(*(np.asarray(x[:steps]) for x in recorded))


class _Carry(NamedTuple):
    step: jax.Array
    k: tuple[jax.Array, ...]  # per layer [B, 1, K, T, H]
    v: tuple[jax.Array, ...]
    before: tuple[Before | None, ...]  # per layer
    tokens: jax.Array  # [B, 1]
    finished: jax.Array  # [B]
    recorded: Recorded


@functools.partial(jax.jit, static_argnames=("graph", "layout", "capacity_blocks"))
def _decode(
    graph: Any,
    params: Any,
    prefix: tuple[tuple[Prefix, Sketched | None], ...],
    lengths: jax.Array,
    first: jax.Array,
    forced: jax.Array,
    steps: jax.Array,
    stop_tokens: jax.Array,
    errors: jax.Array,
    layout: KVLayout,
    capacity_blocks: int,
) -> tuple[Recorded, jax.Array]:
    model = nnx.merge(graph, params)
    batch, slots = forced.shape
    empty = jnp.zeros((batch, 1, layout.num_kv_heads, slots, layout.head_dim), layout.jax_dtype)
    layers, heads = len(layout.global_layers), layout.num_heads

    def step(carry: _Carry) -> _Carry:
        t = carry.step
        positions = (lengths + t)[:, None]
        x = model._embed(carry.tokens)
        keys, values, before = list(carry.k), list(carry.v), list(carry.before)
        seen = []
        for index, layer in enumerate(model.layers):
            q, k, v = layer.attention._project(layer.attention_norm(x), positions)
            keys[index], values[index] = (
                jax.lax.dynamic_update_index_in_dim(own, new.astype(own.dtype), t, 3)
                for own, new in ((keys[index], k), (values[index], v))
            )
            past = Past(keys[index], values[index], t, lengths)
            if layer.attention.sliding_window is not None:
                out = attend_recent(q, prefix[index][0], past, layer.attention)
            else:
                known = Layer(index, *prefix[index], layer.attention.scale, layout, capacity_blocks)
                out, own, before[index] = _layer(
                    q.astype(jnp.float32), known, past, before[index], errors
                )
                seen.append(own)
            x = layer.finish(x, layer.attention.o(out.astype(x.dtype)))
        features, budgets, window_error = zip(*seen, strict=True)
        running = ~carry.finished & (t < steps)
        now = Recorded(
            jnp.stack(features, axis=1),
            jnp.stack(budgets, axis=3),
            jnp.stack(window_error, axis=1),
            host_tokens(layout, lengths + t),
            running,
        )
        free = jnp.argmax(model._logits(x)[:, 0], axis=-1).astype(jnp.int32)
        token = jnp.where(forced[:, t] == NO_TOKEN, free, forced[:, t])
        stopped = (token[:, None] == stop_tokens).any(axis=-1)
        return _Carry(
            step=t + 1,
            k=tuple(keys),
            v=tuple(values),
            before=tuple(before),
            tokens=token[:, None],
            finished=carry.finished | stopped,
            recorded=jax.tree.map(lambda all, new: all.at[t].set(new), carry.recorded, now),
        )

    def unfinished(carry: _Carry) -> jax.Array:
        return (~carry.finished & (carry.step < steps)).any()

    def room(*shape: int | None, dtype: Any = jnp.float32) -> jax.Array:
        return jnp.zeros((slots, batch, *shape), dtype)

    start = _Carry(
        step=jnp.zeros((), jnp.int32),
        k=(empty,) * len(prefix),
        v=(empty,) * len(prefix),
        before=tuple(
            None if sketched is None else branch_sketch.before_first(sketched, 1)
            for _, sketched in prefix
        ),
        tokens=first[:, None],
        finished=jnp.zeros((batch,), bool),
        recorded=Recorded(
            room(layers, heads, NUM_FEATURES),
            room(len(errors), _GRANULARITIES, layers, heads, dtype=jnp.int32),
            room(layers, heads),
            room(dtype=jnp.int32),
            room(dtype=bool),
        ),
    )
    end = jax.lax.while_loop(unfinished, step, start)
    return end.recorded, end.step


def _layer(
    q: jax.Array, layer: Layer, past: Past, before: Before | None, errors: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array], Before]:
    """One layer of one step for queries `[B, 1, N, H]`.

    Returns:
      Full attention `[B, 1, N * H]`; features `[B, N, F]`, budgets `[B, E, D, N]` and window errors
      `[B, N]`; what the next step wants to know of this one.
    """
    assert before is not None
    prefix, layout = layer.prefix, layer.layout
    batch, _, heads, _ = q.shape
    scores = branch_attention.attention_scores(q, prefix, past, layer.scale)
    window = branch_attention.resident(layout, past, prefix.k.shape[2])
    near = scores.among(window[:, None, None, None, :])
    out, lse = branch_attention.attend(near, prefix, past)
    seen = Before(q, lse.reshape(batch, 1, heads))
    see = features_of(layer, past, True)
    features = head_features(
        see(
            q[:, 0],
            out.reshape(q.shape)[:, 0],
            seen.window_lse[:, 0],
            past.k[:, 0],
            Before(before.q[:, 0], before.window_lse[:, 0]),
        )
    )
    blocks = host_tokens(layout, past.lengths) // BLOCK_TOKENS
    summaries, exponents = branch_attention.make_summaries(prefix, blocks)
    curves = error_curves(q, scores, window, prefix, past, summaries, exponents, layout)

    def by_head(x: jax.Array) -> jax.Array:
        """`[E, B, 1, K, G]` as `[B, E, N]`."""
        return jnp.moveaxis(x.reshape(-1, batch, heads), 0, 1)

    limits = errors[:, None, None, None, None]
    budgets = jnp.stack([by_head(smallest_budgets(curve, limits)) for curve in curves], axis=2)
    window_error = curves[0].errors[..., 0].reshape(batch, heads)
    whole, _ = branch_attention.attend(scores, prefix, past)
    return (
        whole.reshape(batch, 1, -1),
        (features, budgets, window_error),
        seen,
    )
