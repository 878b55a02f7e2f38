"""Figures of what a machine delivers, and of what follows from it.

Like those of `plotting`, each returns a matplotlib `Figure`, shows nothing and saves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fluxion_jax.planning import Plan
from fluxion_jax.plotting import COLOURS, GREY, require_matplotlib, style


def roofline_figure(report: dict[str, Any], peak_gflop_s: float, title: str) -> Any:
    """Draws the host's attention under the two ceilings of its machine.

    A byte of bfloat16 keys and values takes one floating-point operation per query head of the
    group, so the group is the intensity.

    Args:
      report: what `fluxion_jax.bench.host.run` returns.
      peak_gflop_s: 10^9 float32 operations per second that the machine's cores deliver at best.
      title: where it was measured, in one line.

    Returns:
      A matplotlib `Figure` of one panel, a mark for each shape and granularity, with all threads.
    """
    figure = require_matplotlib().Figure(figsize=(8, 4.4), layout="constrained", dpi=110)
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    axes = figure.subplots()
    threads = max(row["threads"] for row in report["rows"])
    rows = [row for row in report["rows"] if row["threads"] == threads]
    ceiling = float(np.median([row["ceiling_gb_s"]["median"] for row in rows]))
    intensity = np.geomspace(0.5, max(64.0, 2 * peak_gflop_s / ceiling), 200)
    axes.plot(intensity, np.minimum(ceiling * intensity, peak_gflop_s), color=GREY, linewidth=1.5)
    axes.annotate(
        f"memory: streaming read, {ceiling:.1f} GB/s",
        (0.6, 0.6 * ceiling),
        fontsize=9,
        color=GREY,
        xytext=(12, -4),
        textcoords="offset points",
    )
    axes.annotate(
        f"compute: float32 matrix product, {peak_gflop_s:.0f} GFLOP/s",
        (intensity[-1], peak_gflop_s),
        fontsize=9,
        color=GREY,
        ha="right",
        xytext=(0, 5),
        textcoords="offset points",
    )
    units = sorted({row["granularity"] for row in rows})
    for unit, colour, marker in zip(units, COLOURS[1:], "os^v", strict=False):
        own = [row for row in rows if row["granularity"] == unit]
        axes.plot(
            [row["group"] for row in own],
            [row["group"] * row["attention_gb_s"]["median"] for row in own],
            marker,
            color=colour,
            ms=7,
            label=f"attention, units of {unit} tokens",
        )
        for row in own:
            axes.annotate(
                f"{row['attention_gb_s']['median']:.1f} GB/s",
                (row["group"], row["group"] * row["attention_gb_s"]["median"]),
                xytext=(8, -10),
                textcoords="offset points",
                fontsize=8,
                color=colour,
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lowest = min(0.5 * ceiling, *(row["group"] * row["attention_gb_s"]["median"] for row in rows))
    axes.set_ylim(0.6 * lowest, 2 * peak_gflop_s)
    ticks = [2**i for i in range(-1, 12) if 2**i <= intensity[-1]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    steps = [d * 10**e for e in range(-2, 7) for d in (1, 2, 5)]
    ticks = [tick for tick in steps if 0.6 * lowest <= tick <= 2 * peak_gflop_s]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(
        "operations per byte of K and V (bfloat16): query heads of a group",
        fontsize=9,
        color=GREY,
    )
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    style(axes, f"GFLOP/s, {threads} threads")
    return figure


def prediction_figure(plans: Sequence[Plan], labels: Sequence[str], title: str) -> Any:
    """Draws what steps would take and on what, as `fluxion_jax.planning.plan` predicts it.

    Args:
      plans: predictions.
      labels: a name for each.
      title: what they are of, in one line.

    Returns:
      A matplotlib `Figure` of one bar a plan, on a common scale: weights, short kernels, reading if
      the heads of a group agree, and what more they read if they do not.
    """
    height = 1.5 + 0.38 * len(plans)
    figure = require_matplotlib().Figure(figsize=(9, height), layout="constrained", dpi=110)
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    axes = figure.subplots()
    rows = range(len(plans))
    dense = [p.dense_s for p in plans]
    layers = [p.layers_s for p in plans]
    agreed, disagreed = ([p.read_s[i] for p in plans] for i in (0, 1))
    apart = [b - a for a, b in zip(agreed, disagreed, strict=True)]
    parts: tuple[tuple[str, list[float], dict[str, Any]], ...] = (
        ("weights", dense, {"color": COLOURS[4]}),
        ("short kernels", layers, {"color": "#111827"}),
        ("host cache, heads of a group agree", agreed, {"color": COLOURS[2]}),
        ("more, if they disagree", apart, {"color": "#c9e6e2", "hatch": "////",
                                           "edgecolor": COLOURS[2], "linewidth": 0}),
    )  # fmt: skip
    left = np.zeros(len(plans))
    for name, seconds, look in parts:
        axes.barh(rows, 1e3 * np.asarray(seconds), left=left, height=0.66, label=name, **look)
        left += 1e3 * np.asarray(seconds)
    for row, p in enumerate(plans):
        low, high = (_milliseconds(s) for s in p.step_s)
        axes.annotate(
            f"{low} ms" if low == high else f"{low} to {high} ms",
            (left[row], row),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_yticks(rows, labels, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * left.max())
    axes.set_xlabel("predicted milliseconds per step", fontsize=9, color=GREY)
    style(axes, "")
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color="#e4e7eb", linewidth=0.8)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"
