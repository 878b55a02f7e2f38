"""The selector: per group the granularity with which a step may read the fewest bytes.

Finer units need smaller budgets and more summaries. For each granularity the bytes are those of the
summaries scanned plus an upper bound of the K/V read: the sum over the group's heads, because how
far their selections overlap is not known before scoring. The smallest wins; equal ones go to the
coarsest, which is ranked fastest. A group whose heads all stream reads nothing.

Axes: B batch, N query heads, K KV heads, G = N // K, D = 4 granularities.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fluxion_jax.cache.layout import GRANULARITIES_TOKENS, KVLayout

# A byte of a summary on the device costs this much less than one on the host. Measured on an H100
# it is 23 (its memory copies at 2.8 TB/s, host and PCIe together bring 123 GB/s); a power of two
# below that leaves room for machines with a faster host.
_DEVICE_ADVANTAGE = 16


def select_granularity(
    budget_tokens: jax.Array, host_tokens: jax.Array, layout: KVLayout
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Chooses granularities and the budgets that go with them.

    Args:
      budget_tokens: int32 `[B, N, D]`, what each head needs at each of the granularities; 0 for a
        head that streams. Rounded up to units, and cut to what the host holds.
      host_tokens: int32 `[B]`.
      layout: of the cache, from which bytes follow.

    Returns:
      `(granularity int32 [B, K], budget_tokens int32 [B, N], clipped bool [B, N])`; clipped are
      heads that wanted more than the host holds.
    """
    batch, heads, _ = budget_tokens.shape
    sizes = jnp.asarray(GRANULARITIES_TOKENS, jnp.int32)
    available = host_tokens[:, None, None]
    capped = jnp.minimum(jnp.maximum(budget_tokens, 0), available)
    wanted = -(-capped // sizes) * sizes
    grouped = wanted.reshape(batch, layout.num_kv_heads, -1, len(sizes)).sum(axis=2)
    read = jnp.minimum(grouped, available)
    units = jnp.where(read > 0, -(-available // sizes), 0)
    # In units of one channel's byte: int32 holds it up to millions of tokens.
    summary, token = (
        2 * (_DEVICE_ADVANTAGE if layout.summaries == "host" else 1),
        2 * layout.jax_dtype.itemsize * _DEVICE_ADVANTAGE,
    )
    cost = units * summary + read * token
    best = len(sizes) - 1 - jnp.argmin(cost[..., ::-1], axis=-1)
    per_head = jnp.repeat(best, heads // layout.num_kv_heads, axis=1)[..., None]
    chosen = jnp.take_along_axis(wanted, per_head, axis=-1)[..., 0]
    asked = jnp.take_along_axis(budget_tokens, per_head, axis=-1)[..., 0]
    held = host_tokens[:, None]
    return sizes[best], chosen, (asked > held) & (held > 0)
