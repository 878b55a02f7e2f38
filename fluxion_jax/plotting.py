"""Figures. Each function draws into axes it is given, shows nothing and saves nothing.

matplotlib is optional (the `plot` extra) and imported only when a figure is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxion_jax.errors import FluxionError

if TYPE_CHECKING:
    from fluxion_jax.fidelity import PolicyReport

# Distinct in hue and in lightness, also for colour-blind readers and in grey print.
COLOURS = ("#334e68", "#d9822b", "#2a9d8f", "#a23b72", "#8d99ae")
GREY = "#52606d"


def require_matplotlib() -> Any:
    """Imports `matplotlib.figure`.

    Raises:
      FluxionError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        raise FluxionError(
            "expected matplotlib for figures, got none; install fluxion-jax[plot]"
        ) from error
    return matplotlib.figure


def fidelity_figure(reports: Sequence[PolicyReport], title: str) -> Any:
    """Draws what policies read and what that costs in fidelity.

    Args:
      reports: one per policy, full attention first.
      title: what was measured, in one line.

    Returns:
      A matplotlib `Figure` of four panels: bytes read per token, fidelity, recall and output error
      by layer.
    """
    figure = require_matplotlib().Figure(figsize=(11, 7), layout="constrained", dpi=150)
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    axes = figure.subplots(2, 2)
    _draw_bytes(axes[0, 0], reports)
    _draw_fidelity(axes[0, 1], reports)
    _draw_layers(axes[1, 0], reports, "recall", "attention mass that was read", "of the full mass")
    _draw_layers(
        axes[1, 1], reports, "output_error", "error of the output", "of the largest head output"
    )
    return figure


def host_figure(report: dict[str, Any], title: str) -> Any:
    """Draws how near the host's kernels come to the speed of memory, with all threads.

    Args:
      report: what `fluxion_jax.bench.host.run` returns.
      title: where it was measured, in one line.

    Returns:
      A matplotlib `Figure` of three panels over the tokens of a unit, a line for each shape:
      attention and scoring as shares of the streaming read, selection as a share of scoring.
    """
    figure = require_matplotlib().Figure(figsize=(11, 3.8), layout="constrained", dpi=150)
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    threads = max(row["threads"] for row in report["rows"])
    rows = [row for row in report["rows"] if row["threads"] == threads]
    shapes = list(dict.fromkeys((row["head_dim"], row["group"]) for row in rows))
    units = sorted({row["granularity"] for row in rows})
    panels: tuple[tuple[str, Callable[[dict[str, Any]], float]], ...] = (
        ("Attention, share of the streaming read", lambda row: row["attention_of_ceiling"]),
        ("Scoring, share of the streaming read", lambda row: row["scoring_of_ceiling"]),
        ("Selection, share of scoring", lambda row: row["selection_of_scoring"]["median"]),
    )
    for axes, (name, share) in zip(figure.subplots(1, 3), panels, strict=True):
        for shape, colour in zip(shapes, COLOURS, strict=False):
            of_shape = [row for row in rows if (row["head_dim"], row["group"]) == shape]
            axes.plot(
                [units.index(row["granularity"]) for row in of_shape],
                [share(row) for row in of_shape],
                color=colour,
                marker="o",
                ms=4,
                label=f"head size {shape[0]}, group {shape[1]}",
            )
        axes.set_xticks(range(len(units)), [str(unit) for unit in units])
        axes.set_xlabel("tokens of a unit", fontsize=9, color=GREY)
        axes.set_ylim(bottom=0)
        style(axes, name)
    figure.axes[0].legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def style(axes: Any, title: str) -> None:
    """Gives axes the look that all figures share: few lines, a grid behind, a title on the left."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=GREY, labelsize=9)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)


def _draw_bytes(axes: Any, reports: Sequence[PolicyReport]) -> None:
    mib = [r.host_bytes_per_token / 2**20 for r in reports]
    bars = axes.bar([r.policy for r in reports], mib, color=COLOURS[: len(reports)], width=0.6)
    for bar, value in zip(bars, mib, strict=True):
        axes.annotate(
            f"{value:.1f}",
            (bar.get_x() + bar.get_width() / 2, value),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    style(axes, "Host memory read per token (MiB)")


def _draw_fidelity(axes: Any, reports: Sequence[PolicyReport]) -> None:
    compared = reports[1:]
    x = np.arange(len(compared))
    agreement = [100 * (r.agreement or 0.0) for r in compared]
    colours = COLOURS[1 : len(reports)]
    bars = axes.bar(x, agreement, color=colours, width=0.5)
    for bar, report, value in zip(bars, compared, agreement, strict=True):
        axes.annotate(
            f"{value:.1f} %\nperplexity {report.perplexity:.2f}",
            (bar.get_x() + bar.get_width() / 2, value),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    axes.set_xticks(x, [r.policy for r in compared])
    axes.set_ylim(0, 125)
    axes.set_yticks([0, 25, 50, 75, 100])
    style(axes, f"Same next token as full attention (its perplexity {reports[0].perplexity:.2f})")


def _draw_layers(
    axes: Any, reports: Sequence[PolicyReport], name: str, title: str, unit: str
) -> None:
    for report, colour in zip(reports, COLOURS, strict=False):
        values = getattr(report, name)
        axes.plot(
            np.arange(len(values)), values, color=colour, marker="o", ms=3, label=report.policy
        )
    axes.set_xlabel("layer", fontsize=9, color=GREY)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)
    style(axes, f"{title[0].upper()}{title[1:]}, share {unit}")


def error_figure(reports: Sequence[PolicyReport], title: str) -> Any:
    """Draws the error of the heads' outputs against the bytes read, policies of a kind joined.

    Args:
      reports: one per policy, full attention first; it has no error and is left out.
      title: what was measured, in one line.

    Returns:
      A matplotlib `Figure` of one panel.
    """
    figure = require_matplotlib().Figure(figsize=(8, 4), layout="constrained", dpi=110)
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    axes = figure.subplots()
    kinds: dict[str, list[tuple[float, float, str]]] = {}
    for report in reports[1:]:
        kind = report.policy.partition(":")[0]
        label = report.policy.partition(":")[2].removeprefix("tolerance=")
        point = (report.host_bytes_per_token / 2**20, float(np.mean(report.output_error)), label)
        kinds.setdefault(kind, []).append(point)
    for (kind, points), colour, marker in zip(kinds.items(), COLOURS, "os^vD", strict=False):
        x, y, labels = zip(*sorted(points), strict=True)
        axes.plot(x, y, color=colour, marker=marker, ms=6, label=kind)
        for place, text in zip(zip(x, y, strict=True), labels, strict=True):
            axes.annotate(
                text,
                place,
                xytext=(6, 5),
                textcoords="offset points",
                fontsize=9,
                color=colour,
            )
    axes.set_xlabel("MiB of the host cache read per token", fontsize=9, color=GREY)
    axes.margins(x=0.12, y=0.15)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.legend(frameon=False, fontsize=9)
    style(axes, "Mean error of the output, share of the largest head output")
    return figure
