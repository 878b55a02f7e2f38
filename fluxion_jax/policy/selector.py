"""The selector: per group the granularity with which a step may read the fewest bytes.

Finer units need smaller budgets and more summaries. For each granularity the bytes are those of the
summaries scanned plus an upper bound of the K/V read: the sum over the group's heads, because how
far their selections overlap is not known before scoring. The smallest wins; equal ones go to the
coarsest, which is ranked fastest. A group whose heads all stream reads nothing.

Axes: B batch, N query heads, K KV heads, G = N // K, D = 4 granularities.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

import pallas_kernels
from fluxion_jax.cache.layout import GRANULARITIES_TOKENS, KVLayout
from pallas_kernels import HEADS, Heads, OfGroups

# A byte of a summary on the device costs this much less than one on the host. Measured on an H100
# it is 23 (its memory copies at 2.8 TB/s, host and PCIe together bring 123 GB/s); a power of two
# below that leaves room for machines with a faster host.
_DEVICE_ADVANTAGE = 16


def choose(
    heads: Heads, asked_tokens: Sequence[jax.Array], host_tokens: jax.Array, layout: KVLayout
) -> tuple[OfGroups, list[jax.Array], list[jax.Array]]:
    """Chooses for the heads of one sequence, as part of a function of `by_sequence`.

    Args:
      heads: the heads.
      asked_tokens: D times int32 `[N]`, what each head needs at each of the granularities; 0 for a
        head that streams. Rounded up to units, and cut to what the host holds.
      host_tokens: int32 scalar.
      layout: of the cache, from which bytes follow.

    Returns:
      Results of one int32 `[N]` each: the granularity; the budget; 1 for heads that wanted more
      than the host holds.
    """
    # In units of one channel's byte: int32 holds it up to millions of tokens.
    summary, token = (
        2 * (_DEVICE_ADVANTAGE if layout.summaries == "host" else 1),
        2 * layout.jax_dtype.itemsize * _DEVICE_ADVANTAGE,
    )
    held = jnp.broadcast_to(host_tokens, heads.index.shape)
    best: list[jax.Array] = []
    for size, asked in reversed(list(zip(GRANULARITIES_TOKENS, asked_tokens, strict=True))):
        wanted = _in_units(jnp.minimum(jnp.maximum(asked, 0), held), size) * size
        read = jnp.minimum(heads.total_of_group(wanted), held)
        units = jnp.where(read > 0, _in_units(held, size), 0)
        cost = units * summary + read * token
        clipped = ((asked > held) & (held > 0)).astype(jnp.int32)
        new = [cost, jnp.full_like(wanted, size), wanted, clipped]
        less = cost < best[0] if best else None
        best = new if less is None else [jnp.where(less, *x) for x in zip(new, best, strict=True)]
    _, granularity, budget_tokens, clipped = best
    return OfGroups([granularity]), [budget_tokens], [clipped]


def select_granularity(
    budget_tokens: jax.Array, host_tokens: jax.Array, layout: KVLayout
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Chooses granularities and the budgets that go with them.

    Args:
      budget_tokens: int32 `[B, N, D]`, see `choose`.
      host_tokens: int32 `[B]`.
      layout: of the cache.

    Returns:
      `(granularity int32 [B, K], budget_tokens int32 [B, N], clipped bool [B, N])`.
    """
    found = pallas_kernels.by_sequence(
        _Choice(layout),
        {"asked_tokens": budget_tokens, "host_tokens": host_tokens},
        {},
        num_heads=budget_tokens.shape[1],
        num_kv_heads=layout.num_kv_heads,
        implementation="xla",
    )
    (granularity,), (chosen,), (clipped,) = found
    return granularity, chosen, clipped != 0


@dataclasses.dataclass(frozen=True)
class _Choice:
    layout: KVLayout

    def __call__(self, heads: Heads) -> tuple[list[jax.Array], ...]:
        asked = [heads.load("asked_tokens", HEADS, i) for i in range(len(GRANULARITIES_TOKENS))]
        return choose(heads, asked, heads.load("host_tokens"), self.layout)


def _in_units(tokens: jax.Array, size: int) -> jax.Array:
    return (tokens + (size - 1)) // size
