"""Summaries: the int8 stand-ins of blocks that decide what is read.

A unit is summarised by the minimum and the maximum of its keys per channel, as Quest does, but in
int8: the minimum rounded down and the maximum up, so the bound on a score stays a bound. The scale
of a channel is a power of two, 2**e. Rounding by nested powers of two composes (the floor of half
a floor is the floor of a quarter), so a summary does not depend on when its scale grew: it is a
function of the keys alone, however they arrived.

Axes: B batch, K KV heads, M blocks, C tokens of a block, H head size, N query heads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# 2**-60 keeps every product in the normal range of float32 and is far below any useful key.
MIN_EXPONENT = -60
_INT8_MAX = 127
# frexp gives 127 = 0.9921875 * 2**7; a mantissa above that needs one more power of two.
_MANTISSA_OF_127 = _INT8_MAX / 128


def fit_exponent(absmax: jax.Array) -> jax.Array:
    """Smallest `e >= MIN_EXPONENT` with `absmax <= 127 * 2**e`; int32, shape of `absmax`."""
    mantissa, exponent = jnp.frexp(absmax.astype(jnp.float32))
    e = exponent - 7 + (mantissa > _MANTISSA_OF_127)
    return jnp.where(absmax > 0, jnp.maximum(e, MIN_EXPONENT), MIN_EXPONENT).astype(jnp.int32)


def summarise_blocks(
    k_blocks: jax.Array, num_blocks: jax.Array, exponents: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Quantises the minima and maxima of new blocks and grows the scales they need.

    Args:
      k_blocks: keys after RoPE, `[B, K, M, C, H]`, any float dtype.
      num_blocks: int32 `[B]`; only the first so many of the `M` blocks count.
      exponents: int32 `[B, K, H]`, the scales so far.

    Returns:
      `(summaries int8 [B, K, M, 2, H], exponents int32 [B, K, H], shift int32 [B, K, H])`. Keys
      that are not finite do not move a scale and give the widest bound, so that their block is
      selected and the fault surfaces in the output.
    """
    keys = k_blocks.astype(jnp.float32)
    finite = jnp.isfinite(keys)
    counted = jnp.arange(keys.shape[2]) < num_blocks[:, None]
    magnitude = jnp.where(finite & counted[:, None, :, None, None], jnp.abs(keys), 0.0)
    grown = jnp.maximum(exponents, fit_exponent(magnitude.max(axis=(2, 3))))

    scaled = jnp.ldexp(jnp.where(finite, keys, 0.0), -grown[:, :, None, None, :])
    low = jnp.where(finite, jnp.floor(scaled), -_INT8_MAX).min(axis=3)
    high = jnp.where(finite, jnp.ceil(scaled), _INT8_MAX).max(axis=3)
    summaries = jnp.stack([low, high], axis=3)
    summaries = jnp.clip(summaries, -_INT8_MAX, _INT8_MAX).astype(jnp.int8)
    return summaries, grown, grown - exponents


def quantise_query(q: jax.Array, exponents: jax.Array, shared: jax.Array) -> jax.Array:
    """Quantises queries for integer scoring, after folding in the channels' scales.

    One step per query head, because only the ranking within a head matters; one per group where
    the group ranks by the maximum over its heads, which must then be comparable.

    Args:
      q: float32 `[B, N, H]`.
      exponents: int32 `[B, K, H]`.
      shared: bool or int `[B, K]`, true where a group shares one ranking.

    Returns:
      int8 `[B, N, H]`; zeros for a head whose query is zero or not finite.
    """
    batch, num_heads, head_dim = q.shape
    kv_heads = exponents.shape[1]
    folded = jnp.ldexp(
        q.astype(jnp.float32).reshape(batch, kv_heads, num_heads // kv_heads, head_dim),
        exponents[:, :, None, :],
    )
    folded = jnp.where(jnp.isfinite(folded).all(axis=-1, keepdims=True), folded, 0.0)
    peak = jnp.abs(folded).max(axis=-1, keepdims=True)
    peak = jnp.where(shared[:, :, None, None] != 0, peak.max(axis=2, keepdims=True), peak)
    # Dividing by the peak first keeps the quotient within [-1, 1] whatever the exponents are.
    unit = folded / jnp.where(peak > 0, peak, 1.0)
    return jnp.round(unit * _INT8_MAX).astype(jnp.int8).reshape(batch, num_heads, head_dim)
