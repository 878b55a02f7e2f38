"""Repeated measurements as a few numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def summarise(values: Sequence[float]) -> dict[str, float | int]:
    """Median, extremes, 99th percentile and relative spread (quartile distance over median)."""
    low, median, high, p99 = np.percentile(values, [25, 50, 75, 99]).tolist()
    return {
        "median": median,
        "min": min(values),
        "max": max(values),
        "p99": p99,
        "spread": (high - low) / median if median else 0.0,
        "repetitions": len(values),
    }
