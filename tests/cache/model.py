"""A plain NumPy model of the cache: what belongs where after any history, straight from the words.

It shares no code with the library. Shapes: tokens of one row of one layer `[K, S, H]`.
"""

from __future__ import annotations

import math

import numpy as np

BLOCK = 16
LEVELS = (16, 32, 64, 128)


class ModelRow:
    """One sequence of one layer: every key and value it was ever given, in order."""

    def __init__(self, kv_heads: int, head_dim: int) -> None:
        self.k = np.zeros((kv_heads, 0, head_dim), np.float32)
        self.v = self.k.copy()
        # A failed step has bounded the block that was about to leave, and nothing takes that back.
        self.bounded_tokens = 0

    def copy(self) -> ModelRow:
        row = ModelRow(self.k.shape[0], self.k.shape[2])
        row.k, row.v = self.k.copy(), self.v.copy()
        row.bounded_tokens = self.bounded_tokens
        return row

    def append(self, k: np.ndarray, v: np.ndarray) -> None:
        self.k = np.concatenate([self.k, k], axis=1)
        self.v = np.concatenate([self.v, v], axis=1)

    def __len__(self) -> int:
        return self.k.shape[1]


def host_tokens(length: int, sinks: int, recent: int) -> int:
    """Stream tokens that have left the window, in whole blocks."""
    left = length - sinks - recent
    return left - left % BLOCK if left > 0 else 0


def exponents(keys: np.ndarray) -> np.ndarray:
    """Powers of two that make the keys `[K, S, H]` fit int8, `[K, H]`."""
    largest = np.abs(keys).max(axis=1, initial=0.0)
    result = np.full(largest.shape, -60)
    for index, value in np.ndenumerate(largest):
        e = -60
        while value > math.ldexp(127.0, e):
            e += 1
        result[index] = e
    return result


def summary(keys: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """int8 `[K, 2, H]` bounds of a unit's keys `[K, S, H]` under exponents `[K, H]`."""
    low = np.floor(keys.min(axis=1) / np.exp2(scale.astype(np.float64)))
    high = np.ceil(keys.max(axis=1) / np.exp2(scale.astype(np.float64)))
    return np.stack([low, high], axis=1).astype(np.int8)


def all_summaries(host_keys: np.ndarray, num_blocks: int) -> dict[int, np.ndarray]:
    """Summary rows by index of the library's layout, for every unit that has a token."""
    scale = exponents(host_keys)
    rows, offset = {}, 0
    for level in LEVELS:
        for unit, start in enumerate(range(0, host_keys.shape[1], level)):
            rows[offset + unit] = summary(host_keys[:, start : start + level], scale)
        offset += num_blocks * BLOCK // level
    return rows
