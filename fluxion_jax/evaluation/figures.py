"""Figures of an evaluation: needles by depth and length, and quality against bytes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from fluxion_jax.cache.layout import GRANULARITIES_TOKENS
from fluxion_jax.plotting import COLOURS, require_matplotlib

_MARKERS = "osD^vP"
# Of policies that are not fixed, so that they stand out.
_STRONG = ("#111827", "#c62828", "#6a1b9a")


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
    title = textwrap.fill(f"Answers found by depth: {tasks}", width=30 * columns)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
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
    """Quality against the bytes read per token, policies of a kind joined by a line.

    Returns:
      A matplotlib `Figure` with a column for each length; the mean score of the tasks above, and
      the KL divergence of real text below, as far as the report has them.
    """
    measures = [
        ("mean score of the tasks", report["rows"], "score", 100.0),
        ("KL from full attention (nats)", report["text_rows"], "kl", 1.0),
    ]
    measures = [measure for measure in measures if measure[1]]
    lengths = sorted({row["length_tokens"] for _, rows, _, _ in measures for row in rows})
    figure = require_matplotlib().Figure(
        figsize=(1 + 4.6 * len(lengths), 0.6 + 3.6 * len(measures)), layout="constrained", dpi=150
    )
    grid = figure.subplots(max(1, len(measures)), max(1, len(lengths)), squeeze=False)
    for panels, (name, rows, value, factor) in zip(grid, measures, strict=False):
        for axes, length in zip(panels, lengths, strict=True):
            own = [row for row in rows if row["length_tokens"] == length]
            _quality_panel(axes, own, value, factor)
            axes.set_title(f"{length} tokens", fontsize=10, loc="left")
            axes.set_xlabel("MiB of the host cache read per token", fontsize=8)
        panels[0].set_ylabel(name, fontsize=9)
    # Below all panels: a table of dozens of policies leaves no room within one.
    lines = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
    columns = max(1, 2 * len(lengths))
    figure.legend(
        lines.values(),
        lines.keys(),
        loc="outside lower left",
        ncols=columns,
        frameon=False,
        fontsize=7,
    )
    return figure


def _quality_panel(axes: Any, rows: Sequence[dict[str, Any]], value: str, factor: float) -> None:
    kinds: dict[str, list[tuple[float, float, str]]] = {}
    for policy in dict.fromkeys(row["policy"] for row in rows):
        own = [row for row in rows if row["policy"] == policy]
        mib = float(np.mean([row["host_bytes_per_token"] for row in own])) / 2**20
        kind, label = _kind(policy)
        point = (mib, factor * float(np.mean([row[value] for row in own])), label)
        kinds.setdefault(kind, []).append(point)
    others = 0
    for kind, points in kinds.items():
        points.sort()
        x, y, labels = zip(*points, strict=True)
        fixed = kind.startswith("fixed")
        if fixed:
            at = GRANULARITIES_TOKENS.index(int(kind.partition(":")[2].split(",")[0]))
            colour = COLOURS[at]
            style = {"ls": "--" if kind.endswith("group") else "-", "lw": 0.9, "ms": 3}
            name = f"{kind} ({', '.join(labels)})"
        else:
            at, colour, others = 4 + others % 2, _STRONG[others % len(_STRONG)], others + 1
            style = {"ls": "-", "lw": 2.0, "ms": 6}
            name = kind
        axes.plot(x, y, marker=_MARKERS[at], color=colour, label=name, **style)
        if not fixed:
            for place, text in zip(zip(x, y, strict=True), labels, strict=True):
                # Lines one above the other: the labels of every second one go below it.
                axes.annotate(
                    text,
                    place,
                    xytext=(4, 5 if others % 2 else -11),
                    textcoords="offset points",
                    fontsize=7,
                    color=colour,
                )
    # Plain numbers, few enough not to touch.
    axes.set_xscale("log", subs=(2, 5))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.margins(x=0.1, y=0.12)
    axes.tick_params(labelsize=8, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e7eb", linewidth=0.8)


def _kind(policy: str) -> tuple[str, str]:
    """The line a policy belongs to, and its label on it."""
    name, *fields = policy.split(":")
    if name == "fixed":
        group = ", per group" if fields[-1] == "group" else ""
        return f"fixed:{fields[0]}{group}", fields[1]
    return name, ":".join(field.removeprefix("tolerance=") for field in fields)
