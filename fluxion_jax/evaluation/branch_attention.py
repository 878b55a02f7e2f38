"""Attention of many policies at once to one shared prefix that lies on the device.

The policies of an evaluation all continue the same prompts. Here each is a *branch*: the prompt's
keys and values are kept once, and every branch selects and attends for itself. Plans and selections
are computed by the product's own functions, so they are the product's bits for the same queries;
attention is dense under a mask, so it differs by rounding only.

Axes: B batch, V branches, T steps, N query heads, K KV heads, G = N // K, S prompt tokens, M
blocks, U summary rows, H head size.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

import pallas_kernels
from fluxion_jax.cache.layout import BLOCK_TOKENS, GRANULARITIES_TOKENS, KVLayout, host_tokens
from fluxion_jax.cache.summaries import fit_exponent, quantise_query
from fluxion_jax.policy.protocol import Plan

_INT8_MAX = 127


class Prefix(NamedTuple):
    """One layer's prompt. A sliding-window layer has no blocks, so M is 0.

    Attributes:
      k: `[B, K, S, H]` in the cache's dtype, after RoPE; S is sinks and whole coarsest units.
      v: likewise.
      lowest: float32 `[B, K, M, H]`, minima of each block's keys, the first block behind the sinks.
      highest: likewise the maxima.
    """

    k: jax.Array
    v: jax.Array
    lowest: jax.Array
    highest: jax.Array


class Past(NamedTuple):
    """What the branches see besides the prompt, at one step of one layer.

    Attributes:
      k: `[B, V, K, T, H]`, keys of the branches' own tokens.
      v: likewise.
      step: int32 scalar; tokens up to and including this one exist.
      prompt_tokens: int32 `[B]`.
    """

    k: jax.Array
    v: jax.Array
    step: jax.Array
    prompt_tokens: jax.Array

    @property
    def lengths(self) -> jax.Array:
        """Tokens before the current one: int32 `[B]`."""
        return self.prompt_tokens + self.step


class Scores(NamedTuple):
    """Scaled scores, float32; minus infinity for what does not exist.

    Attributes:
      prompt: `[B, V, K, G, S]`.
      own: `[B, V, K, G, T]`.
    """

    prompt: jax.Array
    own: jax.Array

    def among(self, seen: jax.Array) -> Scores:
        """Without the prompt tokens outside of `seen`, bool of the shape of `prompt` or less."""
        return self._replace(prompt=jnp.where(seen, self.prompt, -jnp.inf))

    def recent(self, window_tokens: int, past: Past) -> Scores:
        """Only the last tokens, the current one included, as a sliding-window layer sees them."""
        first = past.lengths + 1 - window_tokens
        prompt = jnp.arange(self.prompt.shape[-1]) >= first[:, None]
        own = past.prompt_tokens[:, None] + jnp.arange(self.own.shape[-1]) >= first[:, None]
        seen = (x[:, None, None, None] for x in (prompt, own))
        return Scores(*(jnp.where(x, y, -jnp.inf) for x, y in zip(seen, self, strict=True)))

    def peak(self) -> jax.Array:
        """The largest score of each head: `[B, V, K, G]`."""
        return jnp.maximum(self.prompt.max(axis=-1), self.own.max(axis=-1))


def padded_tokens(layout: KVLayout, tokens: int) -> int:
    """Length of a prefix that holds so many tokens: sinks and whole coarsest units."""
    unit = GRANULARITIES_TOKENS[-1]
    return layout.sink_tokens + -(-max(tokens - layout.sink_tokens, unit) // unit) * unit


def make_prefix(k: jax.Array, v: jax.Array, layout: KVLayout) -> Prefix:
    """Keys and values `[B, K, S, H]` with the bounds of their blocks."""
    batch, kv_heads, _, head_dim = k.shape
    blocks = k[:, :, layout.sink_tokens :].astype(jnp.float32)
    blocks = blocks.reshape(batch, kv_heads, -1, BLOCK_TOKENS, head_dim)
    return Prefix(k, v, blocks.min(axis=3), blocks.max(axis=3))


def make_summaries(prefix: Prefix, host_blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Summaries as the cache would hold them: int8 `[B, K, U, 2, H]`, and exponents `[B, K, H]`."""
    blocks = jnp.arange(prefix.lowest.shape[2])
    exists = (blocks < host_blocks[:, None])[:, None, :, None]
    magnitude = jnp.maximum(jnp.abs(prefix.lowest), jnp.abs(prefix.highest))
    exponents = fit_exponent(jnp.where(exists, magnitude, 0).max(axis=2))
    scale = -exponents[:, :, None, :]
    low = jnp.clip(jnp.floor(jnp.ldexp(prefix.lowest, scale)), -_INT8_MAX, _INT8_MAX)
    high = jnp.clip(jnp.ceil(jnp.ldexp(prefix.highest, scale)), -_INT8_MAX, _INT8_MAX)
    low = jnp.where(exists, low, _INT8_MAX)
    high = jnp.where(exists, high, -_INT8_MAX)
    lows, highs = [], []
    for granularity in GRANULARITIES_TOKENS:
        units = low.shape[2] * BLOCK_TOKENS // granularity
        shape = (*low.shape[:2], units, granularity // BLOCK_TOKENS, low.shape[-1])
        lows.append(low.reshape(shape).min(axis=3))
        highs.append(high.reshape(shape).max(axis=3))
    rows = jnp.stack([jnp.concatenate(lows, axis=2), jnp.concatenate(highs, axis=2)], axis=3)
    return rows.astype(jnp.int8), exponents


def attention_scores(q: jax.Array, prefix: Prefix, past: Past, scale: float) -> Scores:
    """Scores of every key that exists, for queries `[B, V, N, H]`."""
    kv_heads = prefix.k.shape[1]
    grouped = q.reshape(*q.shape[:2], kv_heads, -1, q.shape[-1]).astype(prefix.k.dtype)

    def scores(equation: str, keys: jax.Array, exists: jax.Array) -> jax.Array:
        return jnp.where(exists, _product(equation, grouped, keys) * scale, -jnp.inf)

    position = jnp.arange(prefix.k.shape[2])
    exists = (position < past.prompt_tokens[:, None])[:, None, None, None, :]
    return Scores(
        scores("bvkgh,bksh->bvkgs", prefix.k, exists),
        scores("bvkgh,bvkth->bvkgt", past.k, jnp.arange(past.k.shape[3]) <= past.step),
    )


def attend(scores: Scores, prefix: Prefix, past: Past) -> tuple[jax.Array, jax.Array]:
    """Attention states, float32 `[B, V, K, G, H]` and `[B, V, K, G]`; no head sees nothing."""
    peak = scores.peak()
    out, mass = weighted_sum(scores, peak, prefix, past)
    return out / mass[..., None], jnp.log(mass) + peak


def weighted_sum(
    scores: Scores, peak: jax.Array, prefix: Prefix, past: Past
) -> tuple[jax.Array, jax.Array]:
    """Values and ones, summed with the weights `exp(score - peak)`: see `attend` for shapes."""
    prompt, own = (jnp.exp(x - peak[..., None]) for x in scores)
    dtype = prefix.v.dtype
    out = _product("bvkgs,bksh->bvkgh", prompt.astype(dtype), prefix.v)
    out += _product("bvkgt,bvkth->bvkgh", own.astype(dtype), past.v)
    return out, prompt.sum(axis=-1) + own.sum(axis=-1)


def _product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    precision = "highest" if y.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=jnp.float32)


def resident(layout: KVLayout, past: Past, prompt_tokens: int) -> jax.Array:
    """Which prompt tokens lie in the resident window: bool `[B, S]`."""
    position = jnp.arange(prompt_tokens)
    host_end = layout.sink_tokens + host_tokens(layout, past.lengths)
    return (position < layout.sink_tokens) | (position >= host_end[:, None])


class Selected(NamedTuple):
    """What the branches' plans select.

    Attributes:
      tokens: bool `[B, V, N, S]`, selected prompt tokens.
      blocks: int32 `[B, V, K]`, blocks in the union of each group.
      units: int32 `[B, V, K]`, summaries that must be scored for it.
    """

    tokens: jax.Array
    blocks: jax.Array
    units: jax.Array


def select(
    q: jax.Array,
    plan: Plan,
    summaries: jax.Array,
    exponents: jax.Array,
    past: Past,
    layout: KVLayout,
    dense_below_tokens: int,
) -> Selected:
    """Selects as the product does.

    Args:
      q: `[B, V, N, H]`.
      plan: with a branch axis: `[B, V, K]` and `[B, V, N]`.
      summaries: int8 `[B, K, U, 2, H]`.
      exponents: int32 `[B, K, H]`.
      past: the branches' own tokens.
      layout: of the cache.
      dense_below_tokens: shorter sequences read everything.
    """
    kv_heads = exponents.shape[1]
    num_blocks = summaries.shape[2] * 8 // 15
    host_blocks = host_tokens(layout, past.lengths) // BLOCK_TOKENS

    def one_branch(q: jax.Array, plan: Plan) -> tuple[jax.Array, jax.Array, jax.Array]:
        group = q.shape[1] // kv_heads
        units = pallas_kernels.num_units(plan.granularity, host_blocks)
        per_head = jnp.repeat(units, group, axis=1)
        size = jnp.repeat(plan.granularity, group, axis=1)
        wanted = jnp.maximum(plan.budget_tokens, 0)
        wanted = wanted // size + (wanted % size > 0)
        everything = past.lengths[:, None] + 1 < dense_below_tokens
        wanted = jnp.minimum(jnp.where(everything, per_head, wanted), per_head)
        q8 = quantise_query(q, exponents, plan.shared)
        scores = pallas_kernels.score_units(q8, summaries, plan.granularity, host_blocks)
        bitmap = pallas_kernels.select_units(
            scores, plan.granularity, host_blocks, wanted, plan.shared
        )
        union = pallas_kernels.popcount(pallas_kernels.group_union(bitmap, kv_heads))
        grouped = wanted.reshape(*units.shape, group)
        ranked = (grouped.max(axis=-1) > 0) & (grouped.min(axis=-1) < units)
        return pallas_kernels.unpack(bitmap, num_blocks), union, jnp.where(ranked, units, 0)

    bits, blocks, units = jax.vmap(one_branch, 1, 1)(q, plan)
    tokens = jnp.repeat(bits, BLOCK_TOKENS, axis=-1)
    tokens = jnp.pad(tokens, ((0, 0),) * 3 + ((layout.sink_tokens, 0),))
    return Selected(tokens, blocks, units)
