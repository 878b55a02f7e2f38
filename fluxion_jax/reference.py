"""What attention should be, in float64 and plain NumPy: oracles that share no fast code.

They take whole sequences, `k` and `v` as `[B, K, S, H]` in order of position, and know nothing of
caches, windows or blocks. Slow, and meant to be read: one query head at a time.

Axes: B batch, N query heads, K KV heads, S tokens, H head size. Query head n belongs to KV head
`n // (N // K)`. A unit is an aligned run of `granularity` tokens; the last one may be partial.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from fluxion_jax.errors import ConfigError

Array = npt.NDArray[np.float64]
# Of every sequence, of every query head: the ids of the units it may read.
UnitSets = Sequence[Sequence[Iterable[int]]]


def full_attention(
    q: npt.ArrayLike, k: npt.ArrayLike, v: npt.ArrayLike, lengths: Sequence[int], *, scale: float
) -> tuple[Array, Array]:
    """Attention of one query per head over everything.

    Args:
      q: `[B, N, H]`, not scaled.
      k: `[B, K, S, H]`.
      v: `[B, K, S, H]`.
      lengths: how many of the `S` tokens of each sequence exist.
      scale: factor on the scores.

    Returns:
      `(out [B, N, H], lse [B, N])`; 0 and `-inf` for an empty sequence.
    """
    return _attend(q, k, v, scale, lambda b, _: np.arange(lengths[b]))


def block_sparse_attention(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    lengths: Sequence[int],
    units: UnitSets,
    *,
    granularity: int,
    scale: float,
) -> tuple[Array, Array]:
    """Attention of every query head over its own units.

    Args:
      q: `[B, N, H]`, not scaled.
      k: `[B, K, S, H]`.
      v: `[B, K, S, H]`.
      lengths: how many of the `S` tokens of each sequence exist.
      units: `units[b][n]` holds the unit ids of query head n; an id named twice counts once.
      granularity: tokens of a unit.
      scale: factor on the scores.

    Returns:
      `(out [B, N, H], lse [B, N])`; 0 and `-inf` for an empty set.

    Raises:
      ConfigError: if a unit does not exist.
    """

    def tokens(b: int, n: int) -> npt.NDArray[np.int64]:
        starts = sorted({unit * granularity for unit in units[b][n]})
        if starts and not 0 <= starts[0] <= starts[-1] < lengths[b]:
            raise ConfigError(
                f"expected units of sequence {b} within its {lengths[b]} tokens, got "
                f"{sorted(units[b][n])} of {granularity} tokens; drop those beyond the end"
            )
        runs = [np.arange(start, min(start + granularity, lengths[b])) for start in starts]
        return np.concatenate([np.arange(0), *runs])

    return _attend(q, k, v, scale, tokens)


def oracle_selection(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    lengths: Sequence[int],
    k_units: npt.ArrayLike,
    *,
    granularity: int,
    scale: float,
    per_group: bool = False,
) -> list[list[list[int]]]:
    """The best selection there is: the units that hold the most of a head's attention mass.

    Args:
      q: `[B, N, H]`, not scaled.
      k: `[B, K, S, H]`.
      lengths: how many of the `S` tokens of each sequence exist.
      k_units: int `[B, N]`, how many units each query head takes, at most all.
      granularity: tokens of a unit.
      scale: factor on the scores.
      per_group: rank once for all heads of a KV head, by the largest share of the mass that a
        unit holds for any of them; the largest `k_units` counts.

    Returns:
      `units[b][n]`, ascending unit ids; of equal units the lowest ids are taken.
    """
    q, k, k_units = np.asarray(q, np.float64), np.asarray(k, np.float64), np.asarray(k_units)
    batch, num_heads, _ = q.shape
    group = num_heads // k.shape[1]
    selection: list[list[list[int]]] = []
    for b in range(batch):
        mass = [
            unit_mass(q[b, n], k[b, n // group, : lengths[b]], granularity, scale)
            for n in range(num_heads)
        ]
        heads = []
        for n in range(num_heads):
            members = range(n - n % group, n - n % group + group) if per_group else [n]
            ranking = np.max([mass[m] for m in members], axis=0)
            wanted = max(int(k_units[b, m]) for m in members)
            best = np.argsort(-ranking, kind="stable")[:wanted]
            heads.append(sorted(best.tolist()))
        selection.append(heads)
    return selection


def unit_mass(q: npt.ArrayLike, k: npt.ArrayLike, granularity: int, scale: float) -> Array:
    """The share of one head's attention mass that each unit holds.

    Args:
      q: `[H]`, not scaled.
      k: `[S, H]`, all keys.
      granularity: tokens of a unit.
      scale: factor on the scores.

    Returns:
      `[units]`, summing to 1; empty for no keys.
    """
    scores = scale * (np.asarray(k, np.float64) @ np.asarray(q, np.float64))
    weights = np.exp(scores - scores.max(initial=-np.inf))
    starts = np.arange(0, len(weights), granularity)
    return np.array([weights[i : i + granularity].sum() for i in starts]) / weights.sum()


def merge(states: Sequence[tuple[npt.ArrayLike, npt.ArrayLike]]) -> tuple[Array, Array]:
    """Merges attention states of disjoint sets of keys, head by head.

    Args:
      states: pairs `(out [..., H], lse [...])`.

    Returns:
      `(out, lse)` of the union.
    """
    outs = np.asarray([out for out, _ in states], np.float64)
    lses = np.asarray([lse for _, lse in states], np.float64)
    out, lse = np.zeros(outs.shape[1:]), np.full(lses.shape[1:], -np.inf)
    for head in np.ndindex(lse.shape):
        parts = [
            (outs[(i, *head)], lses[(i, *head)])
            for i in range(len(states))
            if lses[(i, *head)] != -np.inf
        ]
        if parts:
            top = max(part_lse for _, part_lse in parts)
            weights = [np.exp(part_lse - top) for _, part_lse in parts]
            total = sum(weights)
            weighted = sum(w * part_out for w, (part_out, _) in zip(weights, parts, strict=True))
            out[head], lse[head] = weighted / total, top + np.log(total)
    return out, lse


def _attend(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    scale: float,
    tokens_of: Callable[[int, int], npt.NDArray[np.int64]],
) -> tuple[Array, Array]:
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, num_heads, head_dim = q.shape
    group = num_heads // k.shape[1]
    out, lse = np.zeros((batch, num_heads, head_dim)), np.full((batch, num_heads), -np.inf)
    for b in range(batch):
        for n in range(num_heads):
            tokens = tokens_of(b, n)
            scores = scale * (k[b, n // group, tokens] @ q[b, n])
            if len(tokens) == 0 or scores.max() == -np.inf:
                continue
            with np.errstate(invalid="ignore"):
                weights = np.exp(scores - scores.max())
                out[b, n] = weights @ v[b, n // group, tokens] / weights.sum()
                lse[b, n] = scores.max() + np.log(weights.sum())
    return out, lse
