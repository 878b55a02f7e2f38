"""Figures. Each function draws into axes it is given, shows nothing and saves nothing.

matplotlib is optional (the `plot` extra) and imported only when a figure is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxion_jax.errors import FluxionError

if TYPE_CHECKING:
    from fluxion_jax.fidelity import PolicyReport

# Distinct in hue and in lightness, also for colour-blind readers and in grey print.
COLOURS = ("#334e68", "#d9822b", "#2a9d8f", "#a23b72", "#8d99ae")
_GREY = "#52606d"


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


def _style(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_GREY, labelsize=9)
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
    _style(axes, "Host memory read per token (MiB)")


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
    _style(axes, f"Same next token as full attention (its perplexity {reports[0].perplexity:.2f})")


def _draw_layers(
    axes: Any, reports: Sequence[PolicyReport], name: str, title: str, unit: str
) -> None:
    for report, colour in zip(reports, COLOURS, strict=False):
        values = getattr(report, name)
        axes.plot(
            np.arange(len(values)), values, color=colour, marker="o", ms=3, label=report.policy
        )
    axes.set_xlabel("layer", fontsize=9, color=_GREY)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)
    _style(axes, f"{title[0].upper()}{title[1:]}, share {unit}")
