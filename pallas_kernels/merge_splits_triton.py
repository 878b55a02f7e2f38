"""Merging the attention states of equally many programs for every task in one small kernel.

Axes: S splits, T tasks (one KV head of one sequence), G query heads of a task, H head size.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.compat import silence_triton_deprecation

MERGED_SPLITS = 64
"""Splits that a program takes at a time: more do not fit into its registers."""


def merge_splits(
    out: jax.Array, lse: jax.Array, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Merges the states of all splits of a task into that of the task.

    Args:
      out: float32 `[S, T, G, H]`; H is a power of two.
      lse: float32 `[S, T, G]`, `-inf` for a split without blocks, whatever its `out`.
      interpret: run on any platform, slowly; for tests.

    Returns:
      `out` float32 `[T, G, H]` and `lse` float32 `[T, G]`; 0 and `-inf` for a task without blocks.
    """
    _, tasks, group, head_dim = out.shape
    silence_triton_deprecation()
    merged: tuple[jax.Array, jax.Array] = pl.pallas_call(
        _kernel,
        grid=(tasks, group),
        out_shape=(
            jax.ShapeDtypeStruct((tasks, group, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((tasks, group), jnp.float32),
        ),
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="merge_splits",
    )(out, lse)
    return merged


def _kernel(out_ref: Any, lse_ref: Any, merged_ref: Any, merged_lse_ref: Any) -> None:
    task, head = pl.program_id(0), pl.program_id(1)
    splits, head_dim = out_ref.shape[0], out_ref.shape[-1]
    at_once = min(MERGED_SPLITS, pl.next_power_of_2(splits))
    shape = (at_once, head_dim)
    channel = jax.lax.broadcasted_iota(jnp.int32, shape, 1)

    def merge(step: jax.Array, sums: tuple[Any, ...]) -> tuple[Any, ...]:
        largest, denominator, weighted = sums
        split = step * at_once + jnp.arange(at_once, dtype=jnp.int32)
        lse = pltriton.load(lse_ref.at[split, task, head], mask=split < splits, other=-jnp.inf)
        has_blocks = jnp.broadcast_to((lse != -jnp.inf)[:, None], shape)
        index = (
            jnp.broadcast_to(split[:, None], shape),
            jnp.full(shape, task),
            jnp.full(shape, head),
            channel,
        )
        out = pltriton.load(out_ref.at[index], mask=has_blocks, other=0.0)
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
    steps = (splits + at_once - 1) // at_once
    largest, denominator, weighted = jax.lax.fori_loop(0, steps, merge, start)
    divisor = jnp.where(denominator == 0.0, 1.0, denominator)
    merged_ref[task, head] = weighted / divisor
    merged_lse_ref[task, head] = jnp.where(denominator == 0.0, -jnp.inf, largest + jnp.log(divisor))
