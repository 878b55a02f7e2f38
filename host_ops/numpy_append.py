"""What writing a flush into the host cache means, in plain NumPy, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np

from host_ops.types import STATUS_INVALID

BLOCK_TOKENS = 16
GRANULARITIES = (16, 32, 64, 128)
# int8 shifted right by 7 has only its sign left, as after any larger shift.
_MAX_SHIFT = 7


def level_offset(granularity: int, num_blocks: int) -> int:
    """Returns the first summary row of a granularity, for `num_blocks` = P."""
    return {16: 0, 32: num_blocks, 64: num_blocks * 3 // 2, 128: num_blocks * 7 // 4}[granularity]


def num_units(granularity: int, host_blocks: int) -> int:
    """Returns how many units cover the selectable blocks; the last one may be partial."""
    return -(-int(host_blocks) * BLOCK_TOKENS // int(granularity))


def append(k: np.ndarray, v: np.ndarray, summaries: np.ndarray | None, flush: Any) -> np.ndarray:
    """Writes the blocks of a flush; rows with `num_blocks == 0` are left alone.

    Args:
      k: `[B, K, P, C, H]`, changed in place.
      v: likewise.
      summaries: int8 `[B, K, U, 2, H]`, changed in place, or None if kept elsewhere.
      flush: a `host_ops.types.Flush` of NumPy arrays.

    Returns:
      int32 `[1]`, status.
    """
    if not flush_is_valid(flush, k.shape[2]):
        return np.array([STATUS_INVALID], np.int32)
    for b in range(k.shape[0]):
        first, count = int(flush.first_block[b]), int(flush.num_blocks[b])
        if count == 0:
            continue
        k[b, :, first : first + count] = flush.k[b, :, :count]
        v[b, :, first : first + count] = flush.v[b, :, :count]
        if summaries is not None:
            _requantise(summaries[b], flush.shift[b], first, k.shape[2])
            for i in range(count):
                _store_summary(summaries[b], flush.summaries[b, :, i], first + i, k.shape[2])
    return np.zeros(1, np.int32)


def flush_is_valid(flush: Any, num_blocks: int) -> bool:
    """Whether counts, and places and shifts of what is written, are in range of P blocks."""
    first = flush.first_block.astype(np.int64)
    count = flush.num_blocks.astype(np.int64)
    counts = ((count >= 0) & (count <= flush.k.shape[2])).all()
    places = (count == 0) | ((first >= 0) & (first + count <= num_blocks))
    shifts = (count == 0) | (flush.shift >= 0).all(axis=(1, 2))
    return bool(counts and places.all() and shifts.all())


def _requantise(
    summaries: np.ndarray, shift: np.ndarray, written_blocks: int, num_blocks: int
) -> None:
    shift = np.minimum(shift, _MAX_SHIFT).astype(np.int16)[:, None]
    for granularity in GRANULARITIES:
        first = level_offset(granularity, num_blocks)
        rows = slice(first, first + num_units(granularity, written_blocks))
        low = summaries[:, rows, 0].astype(np.int16)
        high = summaries[:, rows, 1].astype(np.int16)
        summaries[:, rows, 0] = low >> shift
        summaries[:, rows, 1] = -(-high >> shift)


def _store_summary(
    summaries: np.ndarray, block_summary: np.ndarray, block: int, num_blocks: int
) -> None:
    for granularity in GRANULARITIES:
        blocks_per_unit = granularity // BLOCK_TOKENS
        row = level_offset(granularity, num_blocks) + block // blocks_per_unit
        if block % blocks_per_unit == 0:
            summaries[:, row] = block_summary
        else:
            low = np.minimum(summaries[:, row, 0], block_summary[:, 0])
            high = np.maximum(summaries[:, row, 1], block_summary[:, 1])
            summaries[:, row, 0], summaries[:, row, 1] = low, high
