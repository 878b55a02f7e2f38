"""Merging the attention states of shares (see `shares`) in one small kernel.

Axes: S shares, T tasks (one KV head of one sequence), G query heads of a task, G' at least G, H
head size.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.compat import silence_triton_deprecation
from pallas_kernels.shares import shares

MAX_MERGED_SHARES = 64
"""Shares that a program takes at a time: more do not fit into its registers."""


def merge_shares(
    out: jax.Array,
    lse: jax.Array,
    total: jax.Array,
    group: int,
    programs: int,
    tile_blocks: int,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Merges the states of all shares of a task into that of the task.

    Args:
      out: float32 `[S, H, G']`, undefined where a program had no share; H is a power of two.
      lse: float32 `[S, G']`, likewise.
      total: int32 `[T]`, selected blocks of a task.
      group: G.
      programs: what the shares were cut for.
      tile_blocks: likewise.
      interpret: run on any platform, slowly; for tests.

    Returns:
      `out` float32 `[T, G, H]` and `lse` float32 `[T, G]`; 0 and `-inf` for a task without blocks.
    """
    head_dim, tasks = out.shape[1], total.shape[0]
    silence_triton_deprecation()
    merged: tuple[jax.Array, jax.Array] = pl.pallas_call(
        functools.partial(
            _kernel,
            programs=programs,
            tile_blocks=tile_blocks,
            merged_shares=min(MAX_MERGED_SHARES, pl.next_power_of_2(pl.cdiv(out.shape[0], tasks))),
        ),
        grid=(tasks, group),
        out_shape=(
            jax.ShapeDtypeStruct((tasks, group, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((tasks, group), jnp.float32),
        ),
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="merge_shares",
    )(out, lse, total)
    return merged


def _kernel(
    out_ref: Any,
    lse_ref: Any,
    total_ref: Any,
    merged_ref: Any,
    merged_lse_ref: Any,
    *,
    programs: int,
    tile_blocks: int,
    merged_shares: int,
) -> None:
    """The shares of one query head; those of a task lie next to each other."""
    task, head = pl.program_id(0), pl.program_id(1)
    head_dim = out_ref.shape[1]
    total = load_padded(total_ref)
    cut = shares(total, programs, tile_blocks)
    own = jnp.arange(total.shape[0]) == task
    end = jnp.sum(jnp.where(own, cut.end, 0))
    first = end - jnp.sum(jnp.where(own, cut.programs, 0))
    shape = (merged_shares, head_dim)
    channel = jax.lax.broadcasted_iota(jnp.int32, shape, 1)

    def merge(step: jax.Array, sums: tuple[Any, ...]) -> tuple[Any, ...]:
        largest, denominator, weighted = sums
        share = first + step * merged_shares + jnp.arange(merged_shares)
        lse = pltriton.load(lse_ref.at[share, head], mask=share < end, other=-jnp.inf)
        index = (jnp.broadcast_to(share[:, None], shape), channel, jnp.full(shape, head))
        in_task = jnp.broadcast_to((share < end)[:, None], shape)
        out = pltriton.load(out_ref.at[index], mask=in_task, other=0.0)
        new_largest = jnp.maximum(largest, jnp.max(lse))
        finite = jnp.where(new_largest == -jnp.inf, 0.0, new_largest)
        weights = jnp.exp(lse - finite)
        decay = jnp.exp(largest - finite)
        return (
            new_largest,
            denominator * decay + jnp.sum(weights),
            weighted * decay + jnp.sum(weights[:, None] * out, axis=0),
        )

    start = (jnp.float32(-jnp.inf), jnp.float32(0.0), jnp.zeros((head_dim,), jnp.float32))
    steps = (end - first + merged_shares - 1) // merged_shares
    largest, denominator, weighted = jax.lax.fori_loop(0, steps, merge, start)
    divisor = jnp.where(denominator == 0.0, 1.0, denominator)
    merged_ref[task, head] = weighted / divisor
    merged_lse_ref[task, head] = jnp.where(denominator == 0.0, -jnp.inf, largest + jnp.log(divisor))


def load_padded(ref: Any) -> jax.Array:
    """Loads a vector inside a kernel, padded with zeros to the power of two that Triton needs."""
    size = ref.shape[0]
    index = jnp.arange(pl.next_power_of_2(size))
    return pltriton.load(ref.at[index], mask=index < size, other=0)
