"""The sketch of a layer: what the device knows of the host cache without reading it.

A policy has to judge what lies on the host before anything is read there. So the device keeps a
sketch of bounded size: the stream of host blocks is divided into at most 512 runs of equal length,
and of each run it keeps one key and its value, drawn systematically, and the minimum and maximum of
all keys per channel. Attention over the drawn tokens, each weighted by its run's length, estimates
attention over the host; the bounds tell what the sample may have missed.

The sketch also remembers the query of the step before, and what the last queries of a prompt really
needed (`Probes`). Nothing in it depends on what a policy planned, so what a predictor is trained on
is what it will see, whatever its own plans were. Every write is idempotent: a step that failed and
is repeated leaves the same sketch.

Axes: B batch, K KV heads, N query heads, H head size, M runs, X leaving blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import host_ops
from fluxion_jax.cache.layout import BLOCK_TOKENS, KVLayout

# 512 runs of 128-dimensional bfloat16 vectors are 0.5 MiB for each KV head.
MAX_RUNS = 512
# A step through a block's tokens that meets all of them: periodic text must not alias.
_STRIDE_TOKENS = 7

PROBES = (
    "window_error",
    "worst_window_error",
    "host_mass",
    "blocks_16",
    "units_128",
    "participation_16",
    "blocks_above_1_percent",
    "blocks_above_1_permille",
    "out_norm",
)
"""What is measured at the last queries of a prompt, per query head; see `probes.measure`."""


class Sketch(NamedTuple):
    """The sketch of one global layer, on the device.

    Attributes:
      runs: `[B, K, M, 4, H]` in the cache's dtype: a drawn key, its value, the negated minimum and
        the maximum of the run's keys. Rows of runs that no host block has reached are unspecified.
      previous_q: float32 `[B, 2, N, H]`, queries of the steps before, by parity of position.
      previous_lse: float32 `[B, 2, N]`, the log-sum-exp of their resident window.
      previous_position: int32 `[B, 2]`, positions of these queries; -1 where there is none.
      probe_q: float32 `[B, N, H]`, mean of the unit queries that were probed.
      probes: float32 `[B, N, len(PROBES)]`.
      probe_position: int32 `[B]`, position of the last probed query; -1 where there is none.
    """

    runs: jax.Array
    previous_q: jax.Array
    previous_lse: jax.Array
    previous_position: jax.Array
    probe_q: jax.Array
    probes: jax.Array
    probe_position: jax.Array


def run_blocks(num_blocks: int) -> int:
    """Blocks of a run, for a capacity of `num_blocks`."""
    return max(1, -(-num_blocks // MAX_RUNS))


def num_runs(num_blocks: int) -> int:
    """Runs M of a capacity of `num_blocks`."""
    return -(-num_blocks // run_blocks(num_blocks))


def sampled_token(run: Any, blocks_per_run: int) -> Any:
    """Stream index of the token drawn from a run: one of its first block."""
    return run * blocks_per_run * BLOCK_TOKENS + run * _STRIDE_TOKENS % BLOCK_TOKENS


def empty_sketch(layout: KVLayout, batch: int, num_blocks: int) -> Sketch:
    """The sketch of a layer of an empty cache; the layout must know its query heads."""
    assert layout.num_heads is not None
    heads, head_dim = layout.num_heads, layout.head_dim
    runs = (batch, layout.num_kv_heads, num_runs(num_blocks), 4, head_dim)
    return Sketch(
        runs=jnp.zeros(runs, layout.jax_dtype),
        previous_q=jnp.zeros((batch, 2, heads, head_dim), jnp.float32),
        previous_lse=jnp.zeros((batch, 2, heads), jnp.float32),
        previous_position=jnp.full((batch, 2), -1, jnp.int32),
        probe_q=jnp.zeros((batch, heads, head_dim), jnp.float32),
        probes=jnp.zeros((batch, heads, len(PROBES)), jnp.float32),
        probe_position=jnp.full((batch,), -1, jnp.int32),
    )


def forget_rows(sketch: Sketch, rows: jax.Array) -> Sketch:
    """Forgets the rows of bool `[B]`; their runs are out of reach with their length."""
    return sketch._replace(
        previous_position=jnp.where(rows[:, None], -1, sketch.previous_position),
        probe_position=jnp.where(rows, -1, sketch.probe_position),
    )


def sketch_blocks(sketch: Sketch, flush: host_ops.Flush, num_blocks: int) -> Sketch:
    """Takes the blocks that leave the window into their runs.

    Args:
      sketch: of the layer.
      flush: the leaving blocks, consecutive in each row.
      num_blocks: capacity of a sequence in host blocks.
    """
    per_run = run_blocks(num_blocks)
    batch, kv_heads, leaving, _, head_dim = flush.k.shape
    count = (leaving + per_run - 2) // per_run + 1
    run = flush.first_block[:, None] // per_run + jnp.arange(count)
    block = flush.first_block[:, None] + jnp.arange(leaving)
    of_run = block[:, None, :] // per_run == run[:, :, None]
    of_run &= (jnp.arange(leaving) < flush.num_blocks[:, None])[:, None, :]
    started = (of_run & (block % per_run == 0)[:, None, :]).any(axis=-1)

    token = sampled_token(run, per_run) - flush.first_block[:, None] * BLOCK_TOKENS
    token = jnp.clip(token, 0, leaving * BLOCK_TOKENS - 1)[:, None, :, None]
    drawn = [
        jnp.take_along_axis(x.reshape(batch, kv_heads, -1, head_dim), token, axis=2)
        for x in (flush.k, flush.v)
    ]
    bounds = [
        jnp.where(of_run[:, None, :, :, None], x.max(axis=3)[:, :, None], -jnp.inf).max(axis=3)
        for x in (-flush.k, flush.k)
    ]
    rows = jnp.arange(batch)[:, None]
    old = sketch.runs.at[rows, :, run].get(mode="clip")
    fresh = jnp.moveaxis(jnp.stack([*drawn, *bounds], axis=3), 1, 2).astype(old.dtype)
    grown = jnp.concatenate([old[..., :2, :], jnp.maximum(old, fresh)[..., 2:, :]], axis=-2)
    new = jnp.where(started[:, :, None, None, None], fresh, grown)
    place = jnp.where(of_run.any(axis=-1), run, sketch.runs.shape[2])
    return sketch._replace(runs=sketch.runs.at[rows, :, place].set(new, mode="drop"))


def remember_query(
    sketch: Sketch, q: jax.Array, window_lse: jax.Array, position: jax.Array, active: jax.Array
) -> Sketch:
    """Keeps this step's query for the next step, in the slot of its position's parity.

    Args:
      sketch: of the layer.
      q: float32 `[B, N, H]`.
      window_lse: float32 `[B, N]`.
      position: int32 `[B]`, of the query.
      active: bool `[B]`; other rows stay as they are.
    """
    mine = (jnp.arange(2) == position[:, None] % 2) & active[:, None]
    return sketch._replace(
        previous_q=jnp.where(mine[:, :, None, None], q[:, None], sketch.previous_q),
        previous_lse=jnp.where(mine[:, :, None], window_lse[:, None], sketch.previous_lse),
        previous_position=jnp.where(mine, position[:, None], sketch.previous_position),
    )
