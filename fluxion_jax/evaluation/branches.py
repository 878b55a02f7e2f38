"""Answers under many policies at once, each a branch that continues one shared prefix.

The product prefills once and forks its host cache for every policy; each then decodes alone. For a
table of dozens of policies that reads the same prompt dozens of times. Here all branches of a batch
decode together on the device, whose matrix units read the prompt once for all of them. Selections
are the product's, bit for bit for the same queries; bytes are counted as the product counts them.

Axes: B batch, V branches, T steps, N query heads, K KV heads, S prompt tokens, H head size.
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
from fluxion_jax.errors import ConfigError, UnsupportedError
from fluxion_jax.evaluation import branch_attention
from fluxion_jax.evaluation.branch_attention import Past, Prefix
from fluxion_jax.evaluation.oracle import oracle_plan
from fluxion_jax.modules import dense_attention
from fluxion_jax.policy.oracle_policy import OraclePolicy
from fluxion_jax.policy.protocol import Features, Plan, Policy


class Counts(NamedTuple):
    """Exact counts per branch, int32 `[V]`, summed over layers, steps, rows and KV heads.

    Attributes:
      blocks: host blocks read, once for a whole group.
      units: summaries scored.
      cached_blocks: host blocks that could have been read.
      tokens: that came out, over all rows.
    """

    blocks: jax.Array
    units: jax.Array
    cached_blocks: jax.Array
    tokens: jax.Array


@dataclasses.dataclass(frozen=True)
class Branched:
    """What the branches of a batch did.

    Attributes:
      tokens: per branch and row, the tokens that came out, a stop token included.
      host_bytes_per_token: float64 `[V]`, as `DecodeStats` counts them with summaries on the host.
      read_fraction: float64 `[V]`, share of the host cache's K/V blocks that was read.
    """

    tokens: list[list[list[int]]]
    host_bytes_per_token: np.ndarray
    read_fraction: np.ndarray


def run_branches(
    model: Any,
    prompts: Sequence[Sequence[int]],
    policies: Sequence[Policy],
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    layout: KVLayout,
    dense_below_tokens: int,
) -> Branched:
    """Greedy answers of a batch of prompts under several policies.

    Args:
      model: a `Decoder` without sliding-window layers.
      prompts: token ids, at least 2 each; the last one is the first that is decoded.
      policies: a branch each; `OraclePolicy` too.
      max_new_tokens: at most so many per answer, not more than the window's recent tokens.
      stop_tokens: end an answer.
      layout: of the cache whose selection and bytes these are.
      dense_below_tokens: shorter sequences read everything.

    Raises:
      UnsupportedError: the model has sliding-window layers.
      ConfigError: more new tokens than the recent window holds, which would leave it.
    """
    if layout.sliding_layers:
        raise UnsupportedError(
            "expected a model without sliding-window layers for a shared prefix; evaluate it with "
            "forked caches instead"
        )
    if max_new_tokens > layout.recent_tokens:
        raise ConfigError(
            f"expected at most {layout.recent_tokens} new tokens, which all stay in the resident "
            f"window, got {max_new_tokens}; ask for fewer or use forked caches"
        )
    lengths = np.asarray([len(p) - 1 for p in prompts], np.int32)
    padded = branch_attention.padded_tokens(layout, int(lengths.max()))
    ids = np.zeros((len(prompts), padded), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, : lengths[row]] = prompt[:-1]
    graph, params = nnx.split(model)
    prefix = _read_prefix(graph, params, jnp.asarray(ids), layout)
    tokens, counts = _decode(
        graph,
        params,
        prefix,
        jnp.asarray(lengths),
        jnp.asarray([p[-1] for p in prompts], jnp.int32),
        tuple(policies),
        jnp.asarray(stop_tokens, jnp.int32),
        max_new_tokens,
        layout,
        dense_below_tokens,
    )
    found = np.asarray(tokens)
    blocks, units, cached, answered = (np.asarray(c, np.int64) for c in counts)
    read = blocks * layout.block_bytes + units * layout.unit_summary_bytes
    return Branched(
        [[row[row != NO_TOKEN].tolist() for row in found[:, v]] for v in range(len(policies))],
        read / np.maximum(answered, 1),
        blocks / np.maximum(cached, 1),
    )


@functools.partial(jax.jit, static_argnames=("graph", "layout"))
def _read_prefix(
    graph: Any, params: Any, tokens: jax.Array, layout: KVLayout
) -> tuple[Prefix, ...]:
    """Keys and values of prompts `[B, S]` with full causal attention, per layer."""
    model = nnx.merge(graph, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    x = model._embed(tokens)
    prefix = []
    for layer in model.layers:
        normed = layer.attention_norm(x)
        q, k, v = layer.attention._project(normed, positions)
        k, v = (y.astype(layout.jax_dtype) for y in (k, v))
        attended = _causal_attention(q, k, v, layer.attention.scale).astype(x.dtype)
        x = layer.finish(x, layer.attention.o(attended.reshape(*x.shape[:2], -1)))
        k, v = (jnp.swapaxes(y, 1, 2) for y in (k, v))
        prefix.append(branch_attention.make_prefix(k, v, layout))
    return tuple(prefix)


def _causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
    """`[B, S, N, H]`; cuDNN's kernel where there is one, because XLA's keeps every score."""
    if jax.default_backend() == "gpu" and k.dtype == jnp.bfloat16:
        return jax.nn.dot_product_attention(
            q.astype(k.dtype), k, v, scale=scale, is_causal=True, implementation="cudnn"
        )
    return dense_attention(q, k, v, None, scale, None)


class _Carry(NamedTuple):
    step: jax.Array
    k: tuple[jax.Array, ...]  # per layer [B, V, K, T, H]
    v: tuple[jax.Array, ...]
    next_tokens: jax.Array  # [B, V]
    finished: jax.Array
    tokens: jax.Array  # [B, V, T]
    counts: Counts


@functools.partial(
    jax.jit, static_argnames=("graph", "max_new_tokens", "layout", "dense_below_tokens")
)
def _decode(
    graph: Any,
    params: Any,
    prefix: tuple[Prefix, ...],
    lengths: jax.Array,
    first: jax.Array,
    policies: tuple[Policy, ...],
    stop_tokens: jax.Array,
    max_new_tokens: int,
    layout: KVLayout,
    dense_below_tokens: int,
) -> tuple[jax.Array, Counts]:
    model = nnx.merge(graph, params)
    batch, branches = lengths.shape[0], len(policies)
    kv_heads, head_dim = layout.num_kv_heads, layout.head_dim
    empty = jnp.zeros((batch, branches, kv_heads, max_new_tokens, head_dim), layout.jax_dtype)
    none = jnp.zeros((branches,), jnp.int32)

    def step(carry: _Carry) -> _Carry:
        t, running = carry.step, ~carry.finished
        positions = jnp.broadcast_to((lengths + t)[:, None], (batch, branches))
        x = model._embed(carry.next_tokens)
        keys, values, blocks, units = list(carry.k), list(carry.v), none, none
        for index, layer in enumerate(model.layers):
            q, k, v = layer.attention._project(layer.attention_norm(x), positions)
            keys[index], values[index] = (
                jax.lax.dynamic_update_index_in_dim(own, new.astype(own.dtype), t, 3)
                for own, new in ((keys[index], k), (values[index], v))
            )
            past = Past(keys[index], values[index], t, lengths)
            out, read = _attend(
                q.astype(jnp.float32),
                index,
                policies,
                prefix[index],
                past,
                layer.attention.scale,
                layout,
                dense_below_tokens,
            )
            blocks += jnp.where(running[..., None], read.blocks, 0).sum(axis=(0, 2))
            units += jnp.where(running[..., None], read.units, 0).sum(axis=(0, 2))
            x = layer.finish(x, layer.attention.o(out.astype(x.dtype).reshape(*x.shape[:2], -1)))
        logits = model._logits(x)
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        token = jnp.where(running, token, NO_TOKEN)
        stopped = (token[..., None] == stop_tokens).any(axis=-1)
        held = host_tokens(layout, lengths + t) // BLOCK_TOKENS * kv_heads * len(prefix)
        cached = jnp.where(running, held[:, None], 0).sum(axis=0)
        return _Carry(
            step=t + 1,
            k=tuple(keys),
            v=tuple(values),
            next_tokens=jnp.where(running, token, carry.next_tokens),
            finished=carry.finished | stopped,
            tokens=carry.tokens.at[:, :, t].set(token),
            counts=Counts(
                carry.counts.blocks + blocks,
                carry.counts.units + units,
                carry.counts.cached_blocks + cached,
                carry.counts.tokens + running.sum(axis=0, dtype=jnp.int32),
            ),
        )

    def unfinished(carry: _Carry) -> jax.Array:
        return (carry.step < max_new_tokens) & ~carry.finished.all()

    start = _Carry(
        step=jnp.zeros((), jnp.int32),
        k=(empty,) * len(prefix),
        v=(empty,) * len(prefix),
        next_tokens=jnp.broadcast_to(first[:, None], (batch, branches)),
        finished=jnp.zeros((batch, branches), bool),
        tokens=jnp.full((batch, branches, max_new_tokens), NO_TOKEN, jnp.int32),
        counts=Counts(none, none, none, none),
    )
    end = jax.lax.while_loop(unfinished, step, start)
    return end.tokens, end.counts


def _attend(
    q: jax.Array,
    index: int,
    policies: tuple[Policy, ...],
    prefix: Prefix,
    past: Past,
    scale: float,
    layout: KVLayout,
    dense_below_tokens: int,
) -> tuple[jax.Array, branch_attention.Selected]:
    """One layer of one step, all branches: `[B, V, N, H]` and what was read."""
    batch, branches, num_heads, _ = q.shape
    scores = branch_attention.attention_scores(q, prefix, past, scale)
    window = branch_attention.resident(layout, past, prefix.k.shape[2])
    host_blocks = host_tokens(layout, past.lengths) // BLOCK_TOKENS
    summaries, exponents = branch_attention.make_summaries(prefix, host_blocks)
    plan = _plan(
        q, index, policies, scores, window, prefix, past, summaries, exponents, layout, scale
    )
    read = branch_attention.select(q, plan, summaries, exponents, past, layout, dense_below_tokens)
    seen = window[:, None, None, :] | read.tokens
    kept = scores.among(seen.reshape(scores.prompt.shape))
    out, _ = branch_attention.attend(kept, prefix, past)
    return out.reshape(batch, branches, num_heads, -1), read


def _plan(
    q: jax.Array,
    index: int,
    policies: tuple[Policy, ...],
    scores: branch_attention.Scores,
    window: jax.Array,
    prefix: Prefix,
    past: Past,
    summaries: jax.Array,
    exponents: jax.Array,
    layout: KVLayout,
    scale: float,
) -> Plan:
    """Every branch's plan; oracles, which need all weights, are planned together."""
    near = scores.among(window[:, None, None, None, :])
    out, lse = branch_attention.attend(near, prefix, past)
    window_out, window_lse = out.reshape(q.shape), lse.reshape(q.shape[:3])
    plans: list[Plan | None] = []
    for v, policy in enumerate(policies):
        if isinstance(policy, OraclePolicy):
            plans.append(None)
            continue
        features = Features(
            q=q[:, v],
            window_out=window_out[:, v],
            window_lse=window_lse[:, v],
            layer=index,
            num_kv_heads=layout.num_kv_heads,
            layout=layout,
            scale=scale,
            capacity_blocks=layout.host_blocks(prefix.k.shape[2]),
            host_tokens=host_tokens(layout, past.lengths),
            window_k=None,
            window_positions=None,
            sketch=None,
        )
        # Plans are stacked, and not every policy says these.
        plan = policy.plan(features, past.lengths + 1)
        plans.append(plan._replace(clipped=None, notes=None))
    oracles = np.asarray([v for v, plan in enumerate(plans) if plan is None], np.int32)
    if oracles.size:
        tolerances = jnp.stack([jnp.asarray(policies[v].tolerance) for v in oracles])
        own = Past(past.k[:, oracles], past.v[:, oracles], past.step, past.prompt_tokens)
        planned = oracle_plan(
            q[:, oracles],
            tolerances,
            jax.tree.map(lambda x: x[:, oracles], scores),
            window,
            prefix,
            own,
            summaries,
            exponents,
            layout,
        )
        for i, v in enumerate(oracles):
            plans[v] = jax.tree.map(lambda x, i=i: x[:, i], planned)
    return jax.tree.map(lambda *xs: jnp.stack(xs, axis=1), *plans)
