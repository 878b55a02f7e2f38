"""Arrays of random values where a benchmark wants them, without a copy through the other side."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import host_ops
from fluxion_jax.cache.host_kv import memory_sharding


def random_array(shape: tuple[int, ...], dtype: Any, kind: str, seed: int = 0) -> jax.Array:
    """Random values in a memory kind, made on the device (one array's size of it, for a moment).

    Floats are uniform in [-1, 1), so that exponentials of dot products stay finite; integers take
    all values. Made from a counter by a few multiplications: real generators take longer than the
    copies that are to be measured.

    Args:
      shape: of the array.
      dtype: a float or integer dtype.
      kind: `"device"` or `"pinned_host"`.
      seed: arrays of different seeds differ.
    """
    sharding = memory_sharding(kind)
    if not math.prod(shape):
        # On a GPU a program's result without bytes lies in device memory, whatever its sharding
        # says, and a compiled program that has met one already refuses the next.
        return jax.device_put(np.zeros(shape, jnp.dtype(dtype)), sharding)
    program = _program(tuple(shape), jnp.dtype(dtype), sharding)
    return program(jnp.uint32(seed))  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=64)
def _program(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
    space = host_ops.HOST if sharding.memory_kind == "pinned_host" else host_ops.DEVICE

    def fill(seed: jax.Array) -> jax.Array:
        bits = jax.lax.iota(jnp.uint32, math.prod(shape)) + seed * jnp.uint32(0x9E3779B9)
        for factor in (0x85EBCA6B, 0xC2B2AE35):
            bits = (bits ^ (bits >> 16)) * jnp.uint32(factor)
        bits ^= bits >> 15
        if jnp.issubdtype(dtype, jnp.floating):
            values = (bits >> 8).astype(jnp.float32) * 2.0**-23 - 1.0
        else:
            values = bits >> (32 - 8 * dtype.itemsize)
        return jax.device_put(values.astype(dtype).reshape(shape), space)

    return jax.jit(fill, out_shardings=sharding)
