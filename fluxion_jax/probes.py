"""Probes: what the last queries of a prompt need of the host cache, measured while it is read.

Prefill attends to everything anyway, so for the last few queries of a chunk the mass of every host
block, and the error that the resident window alone would make, cost next to nothing. They become
part of the layer's sketch, where the policy finds them in every later step ("budgets estimated at
prefill", paper, section 4). Each chunk overwrites what the one before it measured.

Axes: B batch, T tokens of a chunk, Q probes, N query heads, K KV heads, P host blocks, H head size,
S tokens of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fluxion_jax.cache.layout import BLOCK_TOKENS
from fluxion_jax.cache.sketch import Sketch, remember_query
from fluxion_jax.state import AttentionState, merge

# Several, because one query is an accident; few, because each costs a row of all block masses.
NUM_PROBES = 4
_BLOCKS_OF_128 = 128 // BLOCK_TOKENS
_LEAST = 1e-6


class Probes(NamedTuple):
    """Probes on their way through the host cache.

    Attributes:
      token: int32 `[B, Q]`, which of the chunk's tokens they are.
      valid: bool `[B, Q]`, false where a chunk has fewer tokens.
      q: float32 `[B, Q, N, H]`.
      block_lse: float32 `[B, Q, N, P]`, log-sum-exp of each host block; `-inf` where there is none.
      state: attention over the host blocks so far, `[B, Q, N, H]`.
    """

    token: jax.Array
    valid: jax.Array
    q: jax.Array
    block_lse: jax.Array
    state: AttentionState


def start(q: jax.Array, count: jax.Array, num_blocks: int) -> Probes:
    """Picks the last queries of each row.

    Args:
      q: `[B, T, N, H]`.
      count: int32 `[B]`, tokens of each row that count.
      num_blocks: capacity P in host blocks.
    """
    index = count[:, None] - 1 - jnp.arange(min(NUM_PROBES, q.shape[1]))
    chosen = jnp.take_along_axis(q, jnp.maximum(index, 0)[:, :, None, None], axis=1)
    chosen = chosen.astype(jnp.float32)
    return Probes(
        token=jnp.maximum(index, 0),
        valid=index >= 0,
        q=chosen,
        block_lse=jnp.full((*chosen.shape[:3], num_blocks), -jnp.inf, jnp.float32),
        state=AttentionState.empty(chosen.shape),
    )


def see_blocks(
    probes: Probes,
    blocks: Sequence[jax.Array],
    first_block: jax.Array,
    exists: jax.Array,
    counts: jax.Array,
    scale: float,
) -> Probes:
    """Attends to consecutive host blocks.

    Args:
      probes: so far.
      blocks: their keys and values, each `[B, K, X, C, H]`.
      first_block: int32 scalar or `[B]`, where the `X` blocks begin.
      exists: bool `[B, X]`, blocks that are on the host.
      counts: bool `[B, X]`, those of them that were not seen before.
      scale: factor on the scores.
    """
    batch, num_probes, heads, head_dim = probes.q.shape
    k, v = blocks
    kv_heads, num_blocks = k.shape[1:3]
    grouped = probes.q.reshape(batch, num_probes, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum(
        "bqkgh,bkxch->bqkgxc",
        grouped,
        k.astype(jnp.float32),
        precision="highest",
        preferred_element_type=jnp.float32,
    )
    scores = scores.reshape(batch, num_probes, heads, num_blocks, BLOCK_TOKENS) * scale
    lse = jnp.where(exists[:, None, None], jax.nn.logsumexp(scores, axis=-1), -jnp.inf)
    place = jnp.where(
        exists, first_block[..., None] + jnp.arange(num_blocks), probes.block_lse.shape[3]
    )
    rows = jnp.arange(batch)[:, None]
    block_lse = probes.block_lse.at[rows, :, :, place].set(jnp.moveaxis(lse, 3, 1), mode="drop")

    fresh = jnp.where(counts[:, None, None, :, None], scores, -jnp.inf)
    fresh = fresh.reshape(batch, num_probes, heads, -1)
    fresh_lse = jax.nn.logsumexp(fresh, axis=-1)
    weights = jnp.exp(fresh - jnp.where(jnp.isneginf(fresh_lse), 0.0, fresh_lse)[..., None])
    values = jnp.where(counts[:, None, :, None, None], v.astype(jnp.float32), 0.0)
    out = jnp.einsum(
        "bqkgs,bksh->bqkgh",
        weights.reshape(batch, num_probes, kv_heads, heads // kv_heads, -1),
        values.reshape(batch, kv_heads, -1, head_dim),
        precision="highest",
    )
    state = merge(probes.state, (out.reshape(probes.q.shape), fresh_lse))
    return probes._replace(block_lse=block_lse, state=state)


def finish(
    probes: Probes, full: AttentionState, sketch: Sketch, lengths: jax.Array, count: jax.Array
) -> Sketch:
    """Measures, and puts the result into the sketch of rows with at least one token.

    With `s` the host's share of the mass, the window alone errs by
    `s / (1 - s) * |out - out_host|`, here divided by the layer's largest head output at that query.

    Args:
      probes: after all host blocks.
      full: state of the whole chunk, `[B, T, N, H]`, over everything.
      sketch: of the layer.
      lengths: int32 `[B]`, tokens before the chunk.
      count: int32 `[B]`, tokens of the chunk.
    """
    out = jnp.take_along_axis(full.out, probes.token[:, :, None, None], axis=1)
    lse = jnp.take_along_axis(full.lse, probes.token[:, :, None], axis=1)
    host_lse = probes.state.lse
    host_mass = jnp.exp(jnp.minimum(host_lse - lse, 0.0))
    largest = jnp.linalg.norm(out, axis=-1).max(axis=-1, keepdims=True)
    largest = jnp.where(largest > 0, largest, 1.0)
    error = jnp.linalg.norm(out - probes.state.out, axis=-1) / largest
    error = error * host_mass / jnp.maximum(1 - host_mass, _LEAST)
    error = jnp.where(host_mass > 0, error, 0.0)

    of_host = jnp.exp(
        probes.block_lse - jnp.where(jnp.isneginf(host_lse), 0.0, host_lse)[..., None]
    )
    of_all = jnp.exp(probes.block_lse - lse[..., None])
    coarse = of_host.reshape(*of_host.shape[:-1], -1, _BLOCKS_OF_128).sum(axis=-1)
    values = [
        jnp.log2(error + _LEAST),
        jnp.log2(error + _LEAST),
        host_mass,
        _entropy(of_host),
        _entropy(coarse),
        -jnp.log2(jnp.maximum((of_host**2).sum(axis=-1), _LEAST)),
        jnp.log2(1.0 + (of_all > 0.01).sum(axis=-1)),
        jnp.log2(1.0 + (of_all > 0.001).sum(axis=-1)),
        jnp.linalg.norm(out, axis=-1) / largest,
    ]
    weight = probes.valid / jnp.maximum(probes.valid.sum(axis=1, keepdims=True), 1)
    worst = jnp.where(probes.valid[:, :, None], values[1], -jnp.inf).max(axis=1)
    mean = jnp.einsum("bq,bqnf->bnf", weight, jnp.stack(values, axis=-1), precision="highest")
    mean = mean.at[:, :, 1].set(worst)

    norm = jnp.linalg.norm(probes.q, axis=-1, keepdims=True)
    unit = probes.q / jnp.where(norm > 0, norm, 1.0)
    probed = count > 0
    position = (lengths + count - 1).astype(jnp.int32)
    sketch = sketch._replace(
        probe_q=jnp.where(
            probed[:, None, None],
            jnp.einsum("bq,bqnh->bnh", weight, unit, precision="highest"),
            sketch.probe_q,
        ),
        probes=jnp.where(probed[:, None, None], mean, sketch.probes),
        probe_position=jnp.where(probed, position, sketch.probe_position),
    )
    window_lse = lse[:, 0] + jnp.log1p(-jnp.minimum(host_mass[:, 0], 1 - _LEAST))
    return remember_query(sketch, probes.q[:, 0], window_lse, position, probed)


def _entropy(share: jax.Array) -> jax.Array:
    """Entropy in bits of shares over the last axis."""
    return -(share * jnp.log2(jnp.maximum(share, 1e-30))).sum(axis=-1)
