"""What every host operation means, in plain NumPy.

The slow and obvious version: one loop per axis, attention in float64 over the gathered tokens of
one query head, requantisation and folding row by row. The other implementations are tested
against it, so it shares no code with them; the NumPy tier runs it.

Axes as in `host_ops.types`. Arrays `k`, `v` and `summaries` are changed in place; everything else
is only read. Mistakes in the data give `STATUS_INVALID`, no work and no write.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np

from host_ops.numpy_append import (
    BLOCK_TOKENS,
    GRANULARITIES,
    flush_is_valid,
    level_offset,
    num_units,
)
from host_ops.numpy_append import append as append
from host_ops.types import STATUS_INVALID

NOT_A_UNIT = np.iinfo(np.int32).min


class HostShare(NamedTuple):
    """Result of `collect`: what `host_ops.types.Collected` has besides the caches and its times.

    `stages_s` is how long scoring, selection and attention took.
    """

    out: np.ndarray
    lse: np.ndarray
    status: np.ndarray
    blocks_read: np.ndarray
    units_scanned: np.ndarray
    selection: np.ndarray
    stages_s: tuple[float, float, float]


def quantise_query(q: np.ndarray, exponents: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """Quantises queries for scoring.

    Args:
      q: float32 `[B, N, H]`.
      exponents: int32 `[B, K, H]`, summaries of a channel are in units of `2**exponent`.
      shared: `[B, K]`, true where the heads of a group share one scale.

    Returns:
      int8 `[B, N, H]`; a head with a value that is not finite becomes zeros.
    """
    batch, num_heads, _ = q.shape
    num_kv_heads = exponents.shape[1]
    group = num_heads // num_kv_heads
    q8 = np.zeros(q.shape, np.int8)
    for b in range(batch):
        for kv in range(num_kv_heads):
            heads = range(kv * group, (kv + 1) * group)
            scaled = {n: np.ldexp(q[b, n].astype(np.float32), exponents[b, kv]) for n in heads}
            scaled = {n: row for n, row in scaled.items() if np.isfinite(row).all()}
            largest = {n: np.abs(row).max() for n, row in scaled.items()}
            for n, row in scaled.items():
                peak = max(largest.values()) if shared[b, kv] else largest[n]
                if peak > 0:
                    q8[b, n] = np.rint(row / peak * np.float32(127))
    return q8


def score(
    q8: np.ndarray, summaries: np.ndarray, granularity: np.ndarray, host_blocks: np.ndarray
) -> np.ndarray:
    """Scores every unit by the upper bound that its summary gives.

    Args:
      q8: int8 `[B, N, H]`.
      summaries: int8 `[B, K, U, 2, H]`.
      granularity: int32 `[B, K]`.
      host_blocks: int32 `[B]`.

    Returns:
      int32 `[B, N, P]`; entry u belongs to unit u, `NOT_A_UNIT` beyond the last one.
    """
    batch, num_heads, _ = q8.shape
    num_kv_heads = summaries.shape[1]
    num_blocks = summaries.shape[2] * 8 // 15
    scores = np.full((batch, num_heads, num_blocks), NOT_A_UNIT, np.int32)
    for b in range(batch):
        for n in range(num_heads):
            kv = n // (num_heads // num_kv_heads)
            units = num_units(granularity[b, kv], host_blocks[b])
            first = level_offset(int(granularity[b, kv]), num_blocks)
            low = summaries[b, kv, first : first + units, 0].astype(np.int32)
            high = summaries[b, kv, first : first + units, 1].astype(np.int32)
            query = q8[b, n].astype(np.int32)
            scores[b, n, :units] = np.maximum(query * low, query * high).sum(-1)
    return scores


def select(
    scores: np.ndarray,
    granularity: np.ndarray,
    host_blocks: np.ndarray,
    k_units: np.ndarray,
    shared: np.ndarray,
) -> np.ndarray:
    """Takes the best units of every query head; of equal scores the lowest unit id wins.

    Args:
      scores: int32 `[B, N, P]` of `score`.
      granularity: int32 `[B, K]`.
      host_blocks: int32 `[B]`.
      k_units: int32 `[B, N]`, clipped to the number of units.
      shared: `[B, K]`, true where the group ranks once: maximum of the scores, maximum of k.

    Returns:
      uint32 `[B, N, W]`, one bit per base block.
    """
    batch, num_heads, num_blocks = scores.shape
    num_kv_heads = granularity.shape[1]
    group = num_heads // num_kv_heads
    chosen = np.zeros((batch, num_heads, num_blocks), bool)
    for b in range(batch):
        for n in range(num_heads):
            kv = n // group
            heads = slice(kv * group, (kv + 1) * group) if shared[b, kv] else slice(n, n + 1)
            units = num_units(granularity[b, kv], host_blocks[b])
            best = scores[b, heads, :units].max(axis=0).astype(np.int64)
            order = np.argsort(-best, kind="stable")
            wanted = int(np.clip(k_units[b, heads].max(), 0, units))
            blocks_per_unit = int(granularity[b, kv]) // BLOCK_TOKENS
            for unit in order[:wanted]:
                end = min((unit + 1) * blocks_per_unit, int(host_blocks[b]))
                chosen[b, n, unit * blocks_per_unit : end] = True
    return pack(chosen)


def pack(chosen: np.ndarray) -> np.ndarray:
    """Packs bool `[..., P]` into uint32 `[..., W]`; bit i of word w is block 32 w + i."""
    words = np.zeros((*chosen.shape[:-1], -(-chosen.shape[-1] // 32)), np.uint32)
    for block in range(chosen.shape[-1]):
        bit = chosen[..., block].astype(np.uint32) << np.uint32(block % 32)
        words[..., block // 32] |= bit
    return words


def unpack(bitmap: np.ndarray, num_blocks: int) -> np.ndarray:
    """Unpacks uint32 `[..., W]` into bool `[..., num_blocks]`."""
    blocks = np.arange(num_blocks)
    shifts = (blocks % 32).astype(np.uint32)
    return ((bitmap[..., blocks // 32] >> shifts) & np.uint32(1)).astype(bool)


def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, bitmap: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Attends, every query head to its own blocks, in float64.

    Args:
      q: float32 `[B, N, H]`, not scaled.
      k: `[B, K, P, C, H]`.
      v: likewise.
      bitmap: uint32 `[B, N, W]`.
      scale: factor of the scores.

    Returns:
      float32 out `[B, N, H]` and lse `[B, N]`; 0 and `-inf` for an empty set.
    """
    batch, num_heads, head_dim = q.shape
    num_kv_heads, num_blocks = k.shape[1:3]
    out = np.zeros(q.shape, np.float32)
    lse = np.full((batch, num_heads), -np.inf, np.float32)
    chosen = unpack(bitmap, num_blocks)
    for b in range(batch):
        for n in range(num_heads):
            kv = n // (num_heads // num_kv_heads)
            keys = k[b, kv, chosen[b, n]].astype(np.float64).reshape(-1, head_dim)
            values = v[b, kv, chosen[b, n]].astype(np.float64).reshape(-1, head_dim)
            scores = scale * (keys @ q[b, n].astype(np.float64))
            top = scores.max(initial=-np.inf)
            if top == -np.inf:
                continue
            # What is not finite is to surface as NaN, and is no mistake of this function.
            with np.errstate(invalid="ignore"):
                weights = np.exp(scores - top)
                out[b, n] = weights @ values / weights.sum()
                lse[b, n] = top + np.log(weights.sum())
    return out, lse


def collect(
    work: Any,
    k: np.ndarray,
    v: np.ndarray,
    summaries: np.ndarray | None,
    flush: Any,
    scale: float,
) -> HostShare:
    """Selects, attends to the host's share, and then writes the flush.

    Args:
      work: a `host_ops.types.Work` of NumPy arrays.
      k: `[B, K, P, C, H]`, changed in place.
      v: likewise.
      summaries: int8 `[B, K, U, 2, H]`, changed in place, or None (then `work.bitmap` is given).
      flush: a `host_ops.types.Flush` of NumPy arrays.
      scale: factor of the attention scores.

    Returns:
      The host's share. `selection` is that of the tasks with `boundary > 0`, zero elsewhere.
    """
    batch, num_heads, _ = work.q.shape
    num_kv_heads, num_blocks = k.shape[1:3]
    group = num_heads // num_kv_heads
    if not (_work_is_valid(work, num_blocks) and flush_is_valid(flush, num_blocks)):
        return no_work(work, num_blocks, num_kv_heads, STATUS_INVALID)

    is_task = _is_task(work)
    blocks = np.arange(num_blocks)
    units_scanned = np.zeros((batch, num_kv_heads), np.int32)
    clock_s = [time.perf_counter()] * 2
    if work.bitmap is None:
        granularity = np.where(is_task, work.granularity, BLOCK_TOKENS)
        assert summaries is not None
        scores = score(work.q8, summaries, granularity, work.host_blocks)
        clock_s[1] = time.perf_counter()
        bitmap = select(scores, granularity, work.host_blocks, work.k_units, work.shared != 0)
        for b, kv in np.argwhere(is_task):
            units = num_units(granularity[b, kv], work.host_blocks[b])
            wanted = work.k_units[b, kv * group : (kv + 1) * group]
            # Nothing is ranked where every head wants nothing, or every head wants all.
            ranked = wanted.max() > 0 and wanted.min() < units
            units_scanned[b, kv] = units if ranked else 0
    else:
        bitmap = work.bitmap
    chosen = unpack(bitmap, num_blocks) & (blocks < work.host_blocks[:, None, None])
    chosen &= np.repeat(is_task, group, axis=1)[:, :, None]
    mine = chosen & (blocks < np.repeat(work.boundary, group, axis=1)[:, :, None])
    clock_s.append(time.perf_counter())
    out, lse = attend(work.q, k, v, pack(mine), scale)
    clock_s.append(time.perf_counter())
    start_s, scored_s, selected_s, attended_s = clock_s
    union = mine.reshape(batch, num_kv_heads, group, num_blocks).any(2)
    status = append(k, v, summaries, flush)
    return HostShare(
        out,
        lse,
        status,
        union.sum(-1).astype(np.int32),
        units_scanned,
        pack(chosen),
        (scored_s - start_s, selected_s - scored_s, attended_s - selected_s),
    )


def _is_task(work: Any) -> np.ndarray:
    return (work.boundary > 0) & (work.host_blocks[:, None] > 0)


def _work_is_valid(work: Any, num_blocks: int) -> bool:
    selects = _is_task(work) & (work.bitmap is None)
    sizes = (np.isin(work.granularity, GRANULARITIES) | ~selects).all()
    return bool(sizes and (work.host_blocks >= 0).all() and (work.host_blocks <= num_blocks).all())


def no_work(work: Any, num_blocks: int, num_kv_heads: int, status: int) -> HostShare:
    """Returns what `collect` gives when it does nothing and reports `status`."""
    batch, num_heads, _ = work.q.shape
    return HostShare(
        out=np.zeros(work.q.shape, np.float32),
        lse=np.full((batch, num_heads), -np.inf, np.float32),
        status=np.array([status], np.int32),
        blocks_read=np.zeros((batch, num_kv_heads), np.int32),
        units_scanned=np.zeros((batch, num_kv_heads), np.int32),
        selection=np.zeros((batch, num_heads, -(-num_blocks // 32)), np.uint32),
        stages_s=(0.0, 0.0, 0.0),
    )
