"""Figures of an evaluation: needles by depth and length, and quality against bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fluxion_jax.plotting import COLOURS, require_matplotlib

_MARKERS = "osD^vP"


def depth_figure(report: dict[str, Any]) -> Any:
    """Heat maps of the score by the answer's depth and the length, one per policy.

    Returns:
      A matplotlib `Figure`, or None where no sample has a depth.
    """
    samples = [s for s in report["samples"] if s["depth_fraction"] is not None]
    if not samples:
        return None
    policies = report["settings"]["policies"]
    lengths = sorted({s["length_tokens"] for s in samples})
    bins = 10 if len(samples) >= 20 * len(lengths) * len(policies) else 5
    tasks = ", ".join(dict.fromkeys(s["task"] for s in samples))
    columns = min(len(policies), 4)
    rows = -(-len(policies) // columns)
    figure = require_matplotlib().Figure(
        figsize=(1.6 + 2.6 * columns, 0.9 + 3.2 * rows), layout="constrained", dpi=150
    )
    figure.suptitle(f"Answers found by depth: {tasks}", fontsize=11, x=0.01, ha="left")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(policies) :]:
        axes.set_axis_off()
    for axes, policy in zip(grid.flat, policies, strict=False):
        scores = _by_depth([s for s in samples if s["policy"] == policy], lengths, bins)
        image = axes.imshow(scores, vmin=0, vmax=100, cmap="viridis", aspect="auto")
        for (i, j), value in np.ndenumerate(scores):
            if np.isfinite(value):
                colour = "black" if value > 60 else "white"
                axes.text(j, i, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
        axes.set_xticks(range(len(lengths)), [str(n) for n in lengths], fontsize=8)
        edges = [f"{100 * i // bins}-{100 * (i + 1) // bins} %" for i in range(bins)]
        axes.set_yticks(range(bins), edges, fontsize=8)
        axes.set_title(policy, fontsize=10, loc="left")
        axes.set_xlabel("length (tokens)", fontsize=8)
    figure.colorbar(image, ax=grid, label="score", shrink=0.8)
    return figure


def _by_depth(samples: Sequence[dict[str, Any]], lengths: Sequence[int], bins: int) -> np.ndarray:
    """Mean score out of 100, `[bins, lengths]`; NaN where there is no sample."""
    total, count = np.zeros((2, bins, len(lengths)))
    for sample in samples:
        row = min(int(sample["depth_fraction"] * bins), bins - 1)
        at = row, lengths.index(sample["length_tokens"])
        total[at] += 100 * sample["score"]
        count[at] += 1
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def quality_figure(report: dict[str, Any]) -> Any:
    """Quality against the bytes read per token: mean score of the tasks, and KL of real text.

    Returns:
      A matplotlib `Figure` with a panel for each of the two that the report has.
    """
    panels = [
        ("Mean score of the tasks", report["rows"], "score", 100),
        ("KL from full attention (nats)", report["text_rows"], "kl", 1),
    ]
    panels = [panel for panel in panels if panel[1]]
    figure = require_matplotlib().Figure(
        figsize=(1 + 5 * len(panels), 4.4), layout="constrained", dpi=150
    )
    axes_of = figure.subplots(1, max(1, len(panels)), squeeze=False)[0]
    policies = report["settings"]["policies"]
    for axes, (name, rows, value, factor) in zip(axes_of, panels, strict=False):
        for i, length in enumerate(sorted({row["length_tokens"] for row in rows})):
            points = []
            for policy in policies:
                own = [r for r in rows if r["policy"] == policy and r["length_tokens"] == length]
                mib = np.mean([row["host_bytes_per_token"] for row in own]) / 2**20
                points.append((mib, factor * np.mean([row[value] for row in own]), policy))
            points.sort()
            x, y, labels = zip(*points, strict=True)
            axes.plot(
                x,
                y,
                _MARKERS[i % len(_MARKERS)] + "-",
                color=COLOURS[i % len(COLOURS)],
                label=f"{length} tokens",
                ms=5,
                lw=1,
            )
            for place, text in zip(zip(x, y, strict=True), labels, strict=True):
                axes.annotate(
                    text,
                    place,
                    xytext=(4, 5 + 9 * (i % 2)),
                    textcoords="offset points",
                    fontsize=7,
                    color=COLOURS[i % len(COLOURS)],
                )
        axes.set_xscale("symlog", linthresh=0.1)
        axes.margins(x=0.2, y=0.15)
        axes.set_xlabel("MiB of the host cache read per token", fontsize=9)
        axes.set_title(name, fontsize=11, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e4e7eb", linewidth=0.8)
        axes.legend(frameon=False, fontsize=8)
    return figure
