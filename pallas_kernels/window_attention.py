"""Dense attention of one query token to the resident window, grouped heads, one mask per sequence.

Axes: B batch, N query heads, K KV heads, G = N // K, S window slots, H head size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.registry import Implementation, dispatch


def window_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    scale: float,
    implementation: Implementation = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends one query token per sequence to the slots of its window that the mask allows.

    Scores, softmax and sums are float32. What lies in a masked slot has no influence, not even
    NaN.

    Args:
      q: float32, bfloat16 or float16 `[B, N, H]`, not scaled.
      k: float32, bfloat16 or float16 `[B, K, S, H]`; K divides N.
      v: likewise.
      mask: bool `[B, S]`, True where there is a token.
      scale: multiplies `q . k`, usually `H ** -0.5`.
      implementation: "xla", or None for the best available.

    Returns:
      `out` float32 `[B, N, H]` and `lse` float32 `[B, N]` (natural log); 0 and `-inf` where the
      mask allows nothing.

    Raises:
      ValueError: if the shapes do not fit together.
    """
    _check(q, k, v, mask)
    return dispatch(  # type: ignore[no-any-return]
        "window_attention",
        implementation,
        {"xla": _window_attention_xla},
        q,
        k,
        v,
        mask,
        scale=scale,
    )


def _check(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> None:
    batch, num_heads, head_dim = q.shape
    fits = (
        k.ndim == 4
        and k.shape == v.shape
        and k.shape[0] == batch
        and k.shape[3] == head_dim
        and num_heads % k.shape[1] == 0
        and mask.shape == (batch, k.shape[2])
    )
    if not fits:
        raise ValueError(
            "expected q [B, N, H], k and v [B, K, S, H] with K dividing N, mask [B, S], got "
            f"q {q.shape}, k {k.shape}, v {v.shape}, mask {mask.shape}; correct the shapes"
        )


def _window_attention_xla(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *, scale: float
) -> tuple[jax.Array, jax.Array]:
    batch, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    grouped = q.astype(jnp.float32).reshape(batch, num_kv_heads, -1, head_dim)
    allowed = mask[:, None, None, :]
    scores = jnp.einsum(
        "bkgh,bksh->bkgs", grouped, k.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    scores = jnp.where(allowed, scores * scale, -jnp.inf)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    finite = jnp.where(largest == -jnp.inf, 0.0, largest)
    weights = jnp.exp(scores - finite)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    # A weight of zero does not silence a NaN: 0 * NaN is NaN.
    values = jnp.where(mask[:, None, :, None], v.astype(jnp.float32), 0.0)
    out = jnp.einsum("bkgs,bksh->bkgh", weights, values, precision=jax.lax.Precision.HIGHEST)
    empty = total == 0.0
    out = out / jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, -jnp.inf, finite + jnp.log(jnp.where(empty, 1.0, total)))
    return out.reshape(q.shape), lse.reshape(batch, num_heads)
