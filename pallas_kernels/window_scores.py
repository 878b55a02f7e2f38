"""What the scores of the resident window say of every query head, as three numbers.

Axes: B batch, N query heads, K KV heads, G = N // K, W window slots, H head size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def window_scores(
    q: jax.Array,
    window_k: jax.Array,
    window_positions: jax.Array,
    newest: jax.Array,
    *,
    scale: float,
    sink_tokens: int,
    newest_tokens: int,
) -> jax.Array:
    """Scores the window, and sums up its sinks and its newest tokens, by XLA's operations.

    `window_step` brings the same along with its attention.

    Args:
      q: float32 `[B, N, H]`, not scaled.
      window_k: bfloat16, float16 or float32 `[B, K, W, H]`, keys of the window.
      window_positions: int32 `[B, W]`, -1 for slots that hold no token; those may hold anything.
      newest: int32 `[B]`, the largest of them.
      scale: multiplies `q . k`.
      sink_tokens: positions below it are sinks.
      newest_tokens: positions above `newest` less this many are the newest.

    Returns:
      float32 `[B, N, 3]`: the largest score, the log-sum-exp of the sinks' scores and that of the
      newest tokens' (natural log); `-inf` for no token. A token may be in both.
    """
    batch, heads, head_dim = q.shape
    grouped = q.reshape(batch, window_k.shape[1], -1, head_dim)
    resident = (window_positions >= 0)[:, None]
    # What lies in a slot without a token may not be a number, which no weight of zero silences.
    keys = jnp.where(resident[..., None], window_k.astype(jnp.float32), 0.0)
    scores = jnp.einsum("bkgh,bkwh->bkgw", grouped, keys, precision="highest") * scale
    scores = jnp.where(resident, scores.reshape(batch, heads, -1), -jnp.inf)
    position, last = window_positions[:, None], newest[:, None, None]

    def part(slots: jax.Array) -> jax.Array:
        return jax.nn.logsumexp(jnp.where(slots, scores, -jnp.inf), axis=-1)

    return jnp.stack(
        [
            scores.max(axis=-1),
            part(position < sink_tokens),
            part(position > last - newest_tokens),
        ],
        axis=-1,
    )
