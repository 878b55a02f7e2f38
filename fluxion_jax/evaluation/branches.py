"""Answers under many policies at once, each a branch that continues one shared prefix.

The product prefills once and forks its host cache for every policy; each then decodes alone. For a
table of dozens of policies that reads the same prompt dozens of times. Here all branches of a batch
decode together on the device, whose matrix units read the prompt once for all of them. Selections
are the product's, bit for bit for the same queries; bytes are counted as the product counts them.

Axes: B batch, V branches, T steps, L layers, N query heads, K KV heads, S prompt tokens, H head
size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fluxion_jax.cache.layout import BLOCK_TOKENS, KVLayout, host_tokens
from fluxion_jax.decode import NO_TOKEN
from fluxion_jax.errors import ConfigError
from fluxion_jax.evaluation import branch_attention, branch_sketch
from fluxion_jax.evaluation.branch_attention import Past, Prefix
from fluxion_jax.evaluation.branch_plans import Kind, Layer, kinds, plan_step
from fluxion_jax.evaluation.branch_sketch import Before, Sketched
from fluxion_jax.modules import Attention, dense_attention
from fluxion_jax.policy.protocol import Policy
from fluxion_jax.session import CHUNK_TOKENS

# Prompts and answers of similar length share a compiled program.
_PADDED_TOKENS = 1024
_LEAST_SLOTS = 32


class Counts(NamedTuple):
    """Exact counts per step and branch, int32, summed over rows and KV heads.

    Sums over layers and steps are made on the host, in integers of 64 bits: here 32 must do, which
    hold what one layer reads in one step of any cache that fits into a machine.

    Attributes:
      blocks: `[T, L, V]`, host blocks read by the L global layers, once for a whole group.
      units: `[T, L, V]`, summaries scored.
      cached_blocks: `[T, V]`, host blocks of one layer that could have been read.
      tokens: `[T, V]`, that came out, over all rows.
    """

    blocks: jax.Array
    units: jax.Array
    cached_blocks: jax.Array
    tokens: jax.Array


class Fidelity(NamedTuple):
    """How likely forced tokens are, per row, branch and step `[B, V, T]`.

    Attributes:
      log_probs: float32, natural log of the probability of each forced token.
      kl: float32, divergence of all probabilities from those of the first branch, in nats.
      likeliest: int32, the most likely token in its place.
    """

    log_probs: Any
    kl: Any
    likeliest: Any


@dataclasses.dataclass(frozen=True)
class Branched:
    """What the branches of a batch did.

    Attributes:
      tokens: per branch and row, the tokens that came out, a stop token included.
      host_bytes_per_token: float64 `[V]`, as `DecodeStats` counts them with summaries on the host.
      read_fraction: float64 `[V]`, share of the host cache's K/V blocks that was read.
      fidelity: NumPy arrays, where tokens were forced.
    """

    tokens: list[list[list[int]]]
    host_bytes_per_token: np.ndarray
    read_fraction: np.ndarray
    fidelity: Fidelity | None


def run_branches(
    model: Any,
    prompts: Sequence[Sequence[int]],
    policies: Sequence[Policy],
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    layout: KVLayout,
    dense_below_tokens: int,
    capacity_tokens: int | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    forced: np.ndarray | None = None,
) -> Branched:
    """Greedy answers of a batch of prompts under several policies, or one text under all of them.

    Args:
      model: a `Decoder`.
      prompts: token ids, at least 2 each; the last one is the first that is decoded.
      policies: a branch each; `OraclePolicy` too.
      max_new_tokens: at most so many per answer, not more than the window's recent tokens.
      stop_tokens: end an answer.
      layout: of the cache whose selection and bytes these are; with a sketch for policies that look
        at one.
      dense_below_tokens: shorter sequences read everything.
      capacity_tokens: of that cache, on which the runs of a sketch depend; None for what the
        longest prompt and its answer take.
      chunk_tokens: tokens that one call would prefill; a sketch knows what the last call's queries
        needed.
      forced: int `[B, max_new_tokens]`, what every branch goes on with instead of its own tokens;
        the result then has its fidelity to the first branch.

    Raises:
      ConfigError: more new tokens than the recent window holds, which would leave it.
    """
    if max_new_tokens > layout.recent_tokens:
        raise ConfigError(
            f"expected at most {layout.recent_tokens} new tokens, which all stay in the resident "
            f"window, got {max_new_tokens}; ask for fewer or use forked caches"
        )
    lengths = np.asarray([len(p) - 1 for p in prompts], np.int32)
    needed = int(lengths.max()) + max_new_tokens
    if capacity_tokens is None:
        capacity_tokens = needed
    if capacity_tokens < needed:
        raise ConfigError(
            f"expected a capacity of at least {needed} tokens for prompts and answers, got "
            f"{capacity_tokens}; name a larger one, or None"
        )
    capacity_blocks = layout.host_blocks(capacity_tokens)
    padded = -(-int(lengths.max()) // _PADDED_TOKENS) * _PADDED_TOKENS
    padded = branch_attention.padded_tokens(layout, padded)
    ids = np.zeros((len(prompts), padded), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, : lengths[row]] = prompt[:-1]
    graph, params = nnx.split(model)
    prefix = read_prefix(
        graph, params, jnp.asarray(ids), jnp.asarray(lengths), layout, capacity_blocks, chunk_tokens
    )
    slots = max(_LEAST_SLOTS, 1 << (max_new_tokens - 1).bit_length())
    following = None
    if forced is not None:
        following = jnp.zeros((len(prompts), slots), jnp.int32)
        following = following.at[:, :max_new_tokens].set(jnp.asarray(forced))
    tokens, counts, fidelity = _decode(
        graph,
        params,
        prefix,
        jnp.asarray(lengths),
        jnp.asarray([p[-1] for p in prompts], jnp.int32),
        kinds(policies),
        jnp.asarray(stop_tokens, jnp.int32),
        jnp.asarray(max_new_tokens, jnp.int32),
        following,
        slots,
        layout,
        dense_below_tokens,
        capacity_blocks,
    )
    found = np.asarray(tokens)
    blocks, units, cached, answered = (
        np.asarray(c, np.int64).sum(axis=tuple(range(c.ndim - 1))) for c in counts
    )
    cached *= len(layout.global_layers)
    read = blocks * layout.block_bytes + units * layout.unit_summary_bytes
    return Branched(
        [[row[row != NO_TOKEN].tolist() for row in found[:, v]] for v in range(len(policies))],
        read / np.maximum(answered, 1),
        blocks / np.maximum(cached, 1),
        jax.tree.map(lambda x: np.asarray(x[:, :, :max_new_tokens]), fidelity),
    )


@functools.partial(jax.jit, static_argnames=("graph", "layout", "capacity_blocks", "chunk_tokens"))
def read_prefix(
    graph: Any,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    layout: KVLayout,
    capacity_blocks: int,
    chunk_tokens: int,
    probed_tokens: jax.Array | None = None,
) -> tuple[tuple[Prefix, Sketched | None], ...]:
    """Keys and values of prompts `[B, S]` with full causal attention, and sketches, per layer.

    Args:
      graph: of the model, from `nnx.split`.
      params: likewise.
      tokens: int32 `[B, S]`; S is sinks and whole coarsest units.
      lengths: int32 `[B]`, tokens of the prompts.
      layout: of the cache.
      capacity_blocks: host blocks that a sequence of the cache may have.
      chunk_tokens: tokens that one call would prefill.
      probed_tokens: int32 `[B]`, how many of them were prefilled, if the others were decoded; a
        sketch's probes are those of the prefill's end.
    """
    model = nnx.merge(graph, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    x = model._embed(tokens)
    prefix: list[tuple[Prefix, Sketched | None]] = []
    for layer in model.layers:
        normed = layer.attention_norm(x)
        q, k, v = layer.attention._project(normed, positions)
        k, v = (y.astype(layout.jax_dtype) for y in (k, v))
        window, scale = layer.attention.sliding_window, layer.attention.scale
        attended = _causal_attention(q, k, v, scale, window).astype(x.dtype)
        x = layer.finish(x, layer.attention.o(attended.reshape(*x.shape[:2], -1)))
        k, v = (jnp.swapaxes(y, 1, 2) for y in (k, v))
        if window is not None:
            none = jnp.zeros((*k.shape[:2], 0, k.shape[3]), jnp.float32)
            prefix.append((Prefix(k, v, none, none), None))
            continue
        sketched = None
        if layout.sketch and capacity_blocks:
            sketch = functools.partial(
                branch_sketch.sketch_prompt,
                q,
                k,
                v,
                layout=layout,
                scale=scale,
                capacity_blocks=capacity_blocks,
                chunk_tokens=chunk_tokens,
            )
            sketched = sketch(lengths)
            if probed_tokens is not None:
                sketched = branch_sketch.with_probes(sketched, sketch(probed_tokens))
        prefix.append((branch_attention.make_prefix(k, v, layout), sketched))
    return tuple(prefix)


def _causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, window: int | None
) -> jax.Array:
    """`[B, S, N, H]`; cuDNN's kernel where there is one, because XLA's keeps every score."""
    # The kernel is built for heads of up to 128.
    if jax.default_backend() == "gpu" and k.dtype == jnp.bfloat16 and k.shape[-1] <= 128:
        return jax.nn.dot_product_attention(
            q.astype(k.dtype),
            k,
            v,
            scale=scale,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )
    return dense_attention(q, k, v, None, scale, window)


class _Carry(NamedTuple):
    step: jax.Array
    k: tuple[jax.Array, ...]  # per layer [B, V, K, T, H]
    v: tuple[jax.Array, ...]
    before: tuple[Before | None, ...]  # per layer
    next_tokens: jax.Array  # [B, V]
    finished: jax.Array
    tokens: jax.Array  # [B, V, T]
    counts: Counts
    fidelity: Fidelity | None


@functools.partial(
    jax.jit,
    static_argnames=("graph", "slots", "layout", "dense_below_tokens", "capacity_blocks"),
)
def _decode(
    graph: Any,
    params: Any,
    prefix: tuple[tuple[Prefix, Sketched | None], ...],
    lengths: jax.Array,
    first: jax.Array,
    policies: tuple[Kind, ...],
    stop_tokens: jax.Array,
    max_new_tokens: jax.Array,
    forced: jax.Array | None,
    slots: int,
    layout: KVLayout,
    dense_below_tokens: int,
    capacity_blocks: int,
) -> tuple[jax.Array, Counts, Fidelity | None]:
    model = nnx.merge(graph, params)
    batch, branches = lengths.shape[0], sum(len(kind.branches) for kind in policies)
    kv_heads, head_dim = layout.num_kv_heads, layout.head_dim
    empty = jnp.zeros((batch, branches, kv_heads, slots, head_dim), layout.jax_dtype)
    by_step = jnp.zeros((slots, branches), jnp.int32)
    by_layer = jnp.zeros((slots, len(layout.global_layers), branches), jnp.int32)

    def step(carry: _Carry) -> _Carry:
        t, running = carry.step, ~carry.finished
        positions = jnp.broadcast_to((lengths + t)[:, None], (batch, branches))
        x = model._embed(carry.next_tokens)
        keys, values, before = list(carry.k), list(carry.v), list(carry.before)
        counts = carry.counts
        for index, layer in enumerate(model.layers):
            q, k, v = layer.attention._project(layer.attention_norm(x), positions)
            keys[index], values[index] = (
                jax.lax.dynamic_update_index_in_dim(own, new.astype(own.dtype), t, 3)
                for own, new in ((keys[index], k), (values[index], v))
            )
            past = Past(keys[index], values[index], t, lengths)
            if layer.attention.sliding_window is not None:
                out = attend_recent(q, prefix[index][0], past, layer.attention)
                x = layer.finish(x, layer.attention.o(out.astype(x.dtype)))
                continue
            known = Layer(index, *prefix[index], layer.attention.scale, layout, capacity_blocks)
            out, read, seen = _attend(
                q.astype(jnp.float32), policies, known, past, before[index], dense_below_tokens
            )
            if before[index] is not None:
                before[index] = seen
            at = t, layout.global_index(index)
            blocks, units = (
                jnp.where(running[..., None], x, 0).sum(axis=(0, 2), dtype=jnp.int32)
                for x in (read.blocks, read.units)
            )
            counts = counts._replace(
                blocks=counts.blocks.at[at].set(blocks), units=counts.units.at[at].set(units)
            )
            x = layer.finish(x, layer.attention.o(out.astype(x.dtype).reshape(*x.shape[:2], -1)))
        logits = model._logits(x)
        likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        token, fidelity = likeliest, carry.fidelity
        if forced is not None:
            token = jnp.broadcast_to(forced[:, t, None], likeliest.shape)
            now = _fidelity(logits, token, likeliest)
            fidelity = jax.tree.map(lambda all, new: all.at[:, :, t].set(new), fidelity, now)
        token = jnp.where(running, token, NO_TOKEN)
        stopped = (token[..., None] == stop_tokens).any(axis=-1)
        held = host_tokens(layout, lengths + t) // BLOCK_TOKENS * kv_heads
        cached = jnp.where(running, held[:, None], 0).sum(axis=0, dtype=jnp.int32)
        return _Carry(
            step=t + 1,
            k=tuple(keys),
            v=tuple(values),
            before=tuple(before),
            next_tokens=jnp.where(running, token, carry.next_tokens),
            finished=carry.finished | stopped,
            tokens=carry.tokens.at[:, :, t].set(token),
            counts=counts._replace(
                cached_blocks=counts.cached_blocks.at[t].set(cached),
                tokens=counts.tokens.at[t].set(running.sum(axis=0, dtype=jnp.int32)),
            ),
            fidelity=fidelity,
        )

    def unfinished(carry: _Carry) -> jax.Array:
        return (carry.step < max_new_tokens) & ~carry.finished.all()

    start = _Carry(
        step=jnp.zeros((), jnp.int32),
        k=(empty,) * len(prefix),
        v=(empty,) * len(prefix),
        before=tuple(
            None if sketched is None else branch_sketch.before_first(sketched, branches)
            for _, sketched in prefix
        ),
        next_tokens=jnp.broadcast_to(first[:, None], (batch, branches)),
        finished=jnp.zeros((batch, branches), bool),
        tokens=jnp.full((batch, branches, slots), NO_TOKEN, jnp.int32),
        counts=Counts(by_layer, by_layer, by_step, by_step),
        fidelity=None
        if forced is None
        else Fidelity(
            *(jnp.zeros((batch, branches, slots), x) for x in (jnp.float32, jnp.float32, jnp.int32))
        ),
    )
    end = jax.lax.while_loop(unfinished, step, start)
    return end.tokens, end.counts, end.fidelity


def _fidelity(logits: jax.Array, tokens: jax.Array, likeliest: jax.Array) -> Fidelity:
    """Of tokens `[B, V]` under logits `[B, V, vocabulary]`."""
    logs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    reference = logs[:, :1]
    return Fidelity(
        jnp.take_along_axis(logs, tokens[..., None], axis=-1)[..., 0],
        (jnp.exp(reference) * (reference - logs)).sum(axis=-1),
        likeliest,
    )


def attend_recent(q: jax.Array, prefix: Prefix, past: Past, attention: Attention) -> jax.Array:
    """A sliding-window layer's step for queries `[B, V, N, H]`: `[B, V, N * H]`."""
    assert attention.sliding_window is not None
    scores = branch_attention.attention_scores(
        q.astype(jnp.float32), prefix, past, attention.scale
    ).recent(attention.sliding_window, past)
    out, _ = branch_attention.attend(scores, prefix, past)
    return out.reshape(*q.shape[:2], -1)


def _attend(
    q: jax.Array,
    policies: tuple[Kind, ...],
    layer: Layer,
    past: Past,
    before: Before | None,
    dense_below_tokens: int,
) -> tuple[jax.Array, branch_attention.Selected, Before]:
    """One layer of one step, all branches: `[B, V, N, H]`, what was read, what is remembered."""
    batch, branches, num_heads, _ = q.shape
    prefix, layout = layer.prefix, layer.layout
    scores = branch_attention.attention_scores(q, prefix, past, layer.scale)
    window = branch_attention.resident(layout, past, prefix.k.shape[2])
    host_blocks = host_tokens(layout, past.lengths) // BLOCK_TOKENS
    summaries, exponents = branch_attention.make_summaries(prefix, host_blocks)
    plan, seen = plan_step(q, policies, layer, scores, window, past, before, summaries, exponents)
    read = branch_attention.select(q, plan, summaries, exponents, past, layout, dense_below_tokens)
    chosen = window[:, None, None, :] | read.tokens
    kept = scores.among(chosen.reshape(scores.prompt.shape))
    out, _ = branch_attention.attend(kept, prefix, past)
    return out.reshape(batch, branches, num_heads, -1), read, seen
