"""The sketch of a shared prefix: what a cache prefilled with it would know of its host part.

What prefill leaves is computed once for all branches, by the product's own functions: the tokens
drawn from the runs, and what the last queries of the prompts needed. Blocks that leave the window
while the branches decode are the prompt's, so the runs are the same for all of them; only the query
of the step before is a branch's own.

Axes: B batch, V branches, N query heads, K KV heads, S prompt tokens, M runs, H head size.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fluxion_jax import probes
from fluxion_jax.cache.layout import BLOCK_TOKENS, KVLayout, host_tokens
from fluxion_jax.cache.sketch import Sketch, empty_sketch, num_runs, run_blocks, sampled_token
from fluxion_jax.chunk_attention import attend
from fluxion_jax.evaluation.branch_attention import Past, Prefix


class Sketched(NamedTuple):
    """What a layer's sketch knows before the first step.

    Attributes:
      drawn: `[B, K, M, 2, H]`, key and value that stand for each run; those of runs beyond the
        prompt are unspecified.
      sketch: what prefill leaves besides the runs, of which it has none.
    """

    drawn: jax.Array
    sketch: Sketch


class Before(NamedTuple):
    """The step before, float32.

    Attributes:
      q: `[B, V, N, H]`.
      window_lse: `[B, V, N]`, of attention over its resident window.
    """

    q: jax.Array
    window_lse: jax.Array


def sketch_prompt(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    layout: KVLayout,
    *,
    scale: float,
    capacity_blocks: int,
    chunk_tokens: int,
) -> Sketched:
    """What prefill leaves in the sketch of a layer.

    Args:
      q: `[B, S, N, H]`, after RoPE.
      k: `[B, K, S, H]` in the cache's dtype; S is sinks and whole coarsest units.
      v: likewise.
      lengths: int32 `[B]`, tokens of the prompts, at least 1.
      layout: of the cache, with its query heads.
      scale: factor on the scores.
      capacity_blocks: host blocks that a sequence of the cache may have, above 0.
      chunk_tokens: tokens that one call prefills; only the last call's queries are probed.
    """
    sinks = layout.sink_tokens
    run = jnp.arange(num_runs(capacity_blocks))
    token = sinks + sampled_token(run, run_blocks(capacity_blocks))
    drawn = jnp.stack([jnp.take(x, token, axis=2, mode="clip") for x in (k, v)], axis=3)

    count = jnp.minimum((lengths - 1) % chunk_tokens + 1, probes.NUM_PROBES)
    first = lengths - count
    position = first[:, None] + jnp.arange(probes.NUM_PROBES)
    last = jnp.minimum(position, q.shape[1] - 1)[..., None, None]
    queries = jnp.take_along_axis(q, last, axis=1)
    causal = jnp.arange(k.shape[2]) <= position[..., None]
    full = attend(queries, k, v, causal, scale)

    num_blocks = (k.shape[2] - sinks) // BLOCK_TOKENS
    exists = jnp.arange(num_blocks) < (host_tokens(layout, lengths) // BLOCK_TOKENS)[:, None]
    blocks = [
        x[:, :, sinks:].reshape(*x.shape[:2], num_blocks, BLOCK_TOKENS, x.shape[-1]) for x in (k, v)
    ]
    probed = probes.start(queries, count, num_blocks)
    probed = probes.see_blocks(probed, blocks, jnp.zeros((), jnp.int32), exists, exists, scale)
    # An empty sketch of any capacity: the runs are not among what prefill leaves in it.
    empty = empty_sketch(layout, q.shape[0], 1)
    return Sketched(drawn, probes.finish(probed, full, empty, first, count))


def with_probes(sketched: Sketched, probed: Sketched) -> Sketched:
    """The first, with what the second's queries needed: as if what follows had been decoded."""
    names = ("probe_q", "probes", "probe_position")
    own = {name: getattr(probed.sketch, name) for name in names}
    return sketched._replace(sketch=sketched.sketch._replace(**own))


def runs(
    sketched: Sketched, prefix: Prefix, host_blocks: jax.Array, capacity_blocks: int
) -> jax.Array:
    """The runs of the host blocks so far, as in `Sketch.runs`: `[B, K, M, 4, H]`.

    Args:
      sketched: of the layer.
      prefix: of the layer.
      host_blocks: int32 `[B]`, blocks that have left the window.
      capacity_blocks: as for `sketch_prompt`.
    """
    per_run, count = run_blocks(capacity_blocks), num_runs(capacity_blocks)
    size = count * per_run

    def of_runs(bounds: jax.Array) -> jax.Array:
        """The largest of each run's blocks."""
        held = bounds[:, :, :size]
        missing = size - held.shape[2]
        exists = jnp.arange(size) < host_blocks[:, None]
        held = jnp.pad(held, [(0, 0), (0, 0), (0, missing), (0, 0)])
        held = jnp.where(exists[:, None, :, None], held, -jnp.inf)
        return held.reshape(*held.shape[:2], count, per_run, -1).max(axis=3)

    bounds = jnp.stack([of_runs(-prefix.lowest), of_runs(prefix.highest)], axis=3)
    return jnp.concatenate([sketched.drawn, bounds.astype(sketched.drawn.dtype)], axis=3)


def before_first(sketched: Sketched, branches: int) -> Before:
    """The prompts' last queries, which are what every branch remembers at first."""
    sketch = sketched.sketch
    slot = (sketch.previous_position.max(axis=1) % 2)[:, None]
    q = jnp.take_along_axis(sketch.previous_q, slot[..., None, None], axis=1)
    lse = jnp.take_along_axis(sketch.previous_lse, slot[..., None], axis=1)
    return Before(*(jnp.repeat(x, branches, axis=1) for x in (q, lse)))


def branch_sketch(
    sketched: Sketched, drawn_runs: jax.Array, q: jax.Array, window_lse: jax.Array, past: Past
) -> Sketch:
    """A branch's sketch at a step.

    Args:
      sketched: of the layer.
      drawn_runs: from `runs`.
      q: `[B, N, H]`, the branch's query of the step before.
      window_lse: `[B, N]`, that of its resident window.
      past: whose lengths say when that was.
    """
    position = past.lengths - 1
    # Both slots hold the same query: whichever is looked at, it is that of the step before.
    return sketched.sketch._replace(
        runs=drawn_runs,
        previous_q=jnp.stack([q, q], axis=1),
        previous_lse=jnp.stack([window_lse, window_lse], axis=1),
        previous_position=jnp.stack([position, position], axis=1),
    )


class PromptWindow(NamedTuple):
    """The prompt's part of the resident window, the same for all branches.

    Attributes:
      k: `[B, K, W, H]`.
      positions: int32 `[B, W]`; -1 where a slot holds nothing that counts.
    """

    k: jax.Array
    positions: jax.Array


def prompt_window(prefix: Prefix, past: Past, layout: KVLayout) -> PromptWindow:
    """Sinks and recent tokens of the prompt that are still in the window, W of them at most."""
    sinks = layout.sink_tokens
    host_end = sinks + host_tokens(layout, past.lengths)
    recent = host_end[:, None] + jnp.arange(layout.ring_tokens)
    sink = jnp.broadcast_to(jnp.arange(sinks), (recent.shape[0], sinks))
    position = jnp.concatenate([sink, recent], axis=1)
    position = jnp.where(position < past.prompt_tokens[:, None], position, -1)
    index = jnp.maximum(position, 0)[:, None, :, None]
    return PromptWindow(jnp.take_along_axis(prefix.k, index, axis=2), position)


def branch_window(window: PromptWindow, own_k: jax.Array, past: Past) -> PromptWindow:
    """A branch's resident window: the prompt's part, and its own tokens `[B, K, T, H]`."""
    own = jnp.arange(own_k.shape[2])
    position = jnp.where(own <= past.step, past.prompt_tokens[:, None] + own, -1)
    return PromptWindow(
        jnp.concatenate([window.k, own_k], axis=2),
        jnp.concatenate([window.positions, position], axis=1),
    )
