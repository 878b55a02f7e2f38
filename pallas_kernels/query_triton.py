"""Queries quantised for integer scoring in one Pallas kernel.

XLA takes a kernel for each maximum, and one in between.

Axes: B batch, N query heads, K KV heads, G = N // K, H head size.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.compat import silence_triton_deprecation
from pallas_kernels.registry import require_gpu, traced_once

_INT8_MAX = 127


@functools.partial(traced_once, constants=["interpret"])
def quantise_query(
    q: jax.Array, exponents: jax.Array, shared: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Folds the channels' scales into queries and rounds them to int8.

    Args:
      q: float32 `[B, N, H]`.
      exponents: int32 `[B, K, H]`, -126 to 127.
      shared: bool or int32 `[B, K]`, true where the heads of a group get one step, by the largest
        of them all, so that their scores can be compared.
      interpret: run on any platform, slowly; for tests.

    Returns:
      int8 `[B, N, H]`; zeros for a head whose query is zero or not finite.

    Raises:
      UnsupportedImplementationError: not on a GPU.
    """
    require_gpu(interpret, advice="quantise with XLA")
    batch, num_heads, head_dim = q.shape
    kv_heads = exponents.shape[1]
    tasks, group = batch * kv_heads, num_heads // kv_heads

    def whole_task(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda task: (task,) + (0,) * len(shape))

    silence_triton_deprecation()
    q8: jax.Array = pl.pallas_call(
        _kernel,
        grid=(tasks,),
        in_specs=[
            whole_task(group, head_dim),
            whole_task(head_dim),
            pl.BlockSpec((1,), lambda task: (task,)),
        ],
        out_specs=whole_task(group, head_dim),
        out_shape=jax.ShapeDtypeStruct((tasks, group, head_dim), jnp.int8),
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="quantise_query",
    )(
        q.astype(jnp.float32).reshape(tasks, group, head_dim),
        exponents.reshape(tasks, head_dim),
        shared.astype(jnp.int32).reshape(tasks),
    )
    return q8.reshape(q.shape)


def _kernel(q_ref: Any, exponents_ref: Any, shared_ref: Any, out_ref: Any) -> None:
    group, head_dim = q_ref.shape
    shape = (pl.next_power_of_2(group), pl.next_power_of_2(head_dim))
    head = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    channel = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    exists = (head < group) & (channel < head_dim)
    exponent = pltriton.load(exponents_ref.at[channel], mask=channel < head_dim, other=0)
    step = jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
    folded = pltriton.load(q_ref.at[head, channel], mask=exists, other=0.0) * step
    # A maximum may lose a NaN; counting does not.
    faults = jnp.sum(jnp.where(jnp.abs(folded) < jnp.inf, 0, 1), axis=1)
    folded = jnp.where((faults > 0)[:, None], 0.0, folded)
    peak = jnp.max(jnp.abs(folded), axis=1)
    together = jnp.broadcast_to(shared_ref[0] > 0, peak.shape)
    peak = jnp.where(together, jnp.broadcast_to(jnp.max(peak), peak.shape), peak)
    # Dividing by the peak first keeps the quotient within [-1, 1] whatever the exponents are.
    unit = folded / jnp.where(peak > 0, peak, 1.0)[:, None]
    q8 = _round_half_even(unit * _INT8_MAX)
    pltriton.store(out_ref.at[head, channel], q8.astype(jnp.int8), mask=exists)


def _round_half_even(x: jax.Array) -> jax.Array:
    """The nearest integer, int32; the backend has no such operation."""
    floor = jnp.floor(x)
    below, rest = floor.astype(jnp.int32), x - floor
    up = (rest > 0.5) | ((rest == 0.5) & ((below & 1) == 1))
    return below + jnp.where(up, 1, 0)
