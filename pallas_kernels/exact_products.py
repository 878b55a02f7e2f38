"""Matrix products on tensor cores that are as exact as sums of float32, within kernels.

Tensor cores multiply bfloat16 exactly. So an array that is bfloat16 already is multiplied by three
parts of the other one; for float32 arrays Triton does likewise with parts of TF32.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

PARTS = 3
"""Bfloat16 numbers that sum up to any float32."""


def largest_part(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A bfloat16 array, and what is left of the float32 array without it; both have its sign."""
    # Cut, not rounded: a compiler may take a conversion there and back for none at all.
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-65536)
    part = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return part.astype(jnp.bfloat16), x - part


def cut_float32(x: jax.Array, parts: int) -> list[jax.Array]:
    """Bfloat16 arrays that sum up to the float32 array, the smallest first; three are exact."""
    cut = []
    for _ in range(parts):
        part, x = largest_part(x)
        cut.append(part)
    return cut[::-1]


def parts_for(x: jax.Array, dtype: jnp.dtype) -> list[jax.Array]:
    """What to multiply with an array of `dtype` instead of a float32 array."""
    return cut_float32(x, PARTS) if dtype == jnp.bfloat16 else [x]


def exact_product(
    parts: Sequence[jax.Array], b: jax.Array, axis: int, *, interpret: bool
) -> jax.Array:
    """The product over the last axis of a matrix and an axis of another.

    Args:
      parts: `[X, Y]` each, from `parts_for(matrix, b.dtype)`.
      b: bfloat16, float16 or float32; its `axis` has Y entries.
      axis: of `b`, 0 or 1.
      interpret: whether the kernel is interpreted; its platform may not know TF32.

    Returns:
      float32, X rows.
    """
    multiply = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=(((1,), (axis,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    if b.dtype == jnp.bfloat16:
        return functools.reduce(jnp.add, [multiply(part, b) for part in parts])
    exact = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    precision = jax.lax.Precision.HIGHEST if interpret else exact
    (a,) = parts
    return multiply(a, b.astype(jnp.float32), precision=precision)
