"""Figures of decode steps: what was planned, who read it, and when.

Like those of `plotting`, each returns a matplotlib `Figure`, shows nothing and saves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

import host_ops
from fluxion_jax.cache.layout import BLOCK_TOKENS, GRANULARITIES_TOKENS
from fluxion_jax.errors import ConfigError
from fluxion_jax.plotting import COLOURS, GREY, require_matplotlib
from fluxion_jax.policy.replay_policy import ReplayPolicy
from fluxion_jax.profiling import StepTimeline
from fluxion_jax.stats import DecodeStats

_NOTHING = "#e4e7eb"
# From fine to coarse, from light to dark.
_GRANULARITY_COLOURS = ("#fde0a6", "#d9822b", "#a23b72", "#334e68")


def plans_figure(
    plans: ReplayPolicy, title: str, row: int = 0, labels: Sequence[str] | None = None
) -> Any:
    """Draws what a policy planned for every head in every step.

    Args:
      plans: `Result.plans` of a generation with `Execution(record=True)`.
      title: what was generated, in one line.
      row: of the batch.
      labels: of the steps, for instance the token that each one fed; None numbers them.

    Returns:
      A matplotlib `Figure` of three heat maps over the steps, layers from top to bottom: the class
      of each query head (streaming if it reads nothing from the host), the granularity of each
      group, and the budget of each query head in tokens.

    Raises:
      ConfigError: there is no such row, or not one label for each step.
    """
    rows, steps = np.shape(plans.granularity)[:2]
    if not 0 <= row < rows:
        raise ConfigError(f"expected a row of {rows}, got {row}; rows count from 0")
    if labels is not None and len(labels) != steps:
        raise ConfigError(f"expected a label for each of {steps} steps, got {len(labels)}")
    budget = np.moveaxis(np.asarray(plans.budget_tokens)[row], 0, -1)
    granularity = np.moveaxis(np.asarray(plans.granularity)[row], 0, -1)
    reads = budget > 0
    by_group = reads.reshape(*granularity.shape[:2], -1, steps).any(axis=2)
    which = np.where(by_group, np.searchsorted(GRANULARITIES_TOKENS, granularity) + 1.0, 0.0)
    figure = _figure((12, 5.4), title)
    axes = figure.subplots(1, 3)
    kinds = {"streaming": _NOTHING, "retrieval": COLOURS[0]}
    _map(axes[0], reads.astype(float), "Class of each query head", kinds, labels)
    names = ("nothing", *map(str, GRANULARITIES_TOKENS))
    colours = (_NOTHING, *_GRANULARITY_COLOURS)
    units = dict(zip(names, colours, strict=True))
    _map(axes[1], which, "Granularity of each group (tokens of a unit)", units, labels)
    shown = np.where(reads, budget, np.nan)
    _map(axes[2], shown, "Budget of each query head (tokens)", None, labels)
    return figure


def split_figure(stats: DecodeStats, title: str) -> Any:
    """Draws the bytes that host and device read out of host memory, by layer.

    Args:
      stats: of a generation.
      title: what was generated, in one line.

    Returns:
      A matplotlib `Figure` with one bar a layer: keys and values, and summaries where they lie in
      host memory, in KiB per step.
    """
    layout = stats.layout
    unit = layout.unit_summary_bytes if layout.summaries == "host" else 0
    parts = (
        ("host: keys and values", stats.host_blocks, layout.block_bytes, COLOURS[0]),
        ("host: summaries", stats.host_units, unit, "#9fb3c8"),
        ("device: keys and values", stats.device_blocks, layout.block_bytes, COLOURS[1]),
        ("device: summaries", stats.device_units, unit, "#f3cfa4"),
    )
    layers = np.asarray(layout.global_layers)
    height = 1.4 + 0.26 * len(layers)
    figure = _figure((8.5, height), title)
    axes = figure.subplots()
    left = np.zeros(len(layers))
    for name, count, size, colour in parts:
        kib = np.asarray(count, np.float64) * size / 1024 / max(stats.num_steps, 1)
        if kib.any():
            axes.barh(range(len(layers)), kib, left=left, color=colour, label=name, height=0.7)
            left += kib
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.invert_yaxis()
    axes.set_ylabel("layer", fontsize=9, color=GREY)
    axes.set_xlabel("KiB read out of host memory per step", fontsize=9, color=GREY)
    _style_axes(axes, "x")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def timeline_figure(timeline: StepTimeline, title: str) -> Any:
    """Draws when device program and host threads worked in one step.

    Args:
      timeline: of `profile_step`.
      title: what ran, in one line.

    Returns:
      A matplotlib `Figure`: the whole step above, below it the layer in which the host attended
      longest, by itself. The bar of the host's threads reaches from submit to the end of the last
      task; its lower part says how their working time divides into scoring, selecting and
      attending.
    """
    figure = _figure((11, 4.8), title)
    above, below = figure.subplots(2, 1)
    _draw_timeline(above, timeline)
    above.set_xlim(0, 1e3 * timeline.end_s)
    _style_axes(above, "x", "The whole step")
    handles, labels = above.get_legend_handles_labels()
    _draw_timeline(below, timeline)
    span = _of(timeline, "span")
    shown = int(_of(timeline, "attended").argmax())
    first = timeline.submit_s[shown]
    last = max(timeline.done_s[shown], first + span[shown])
    margin = 0.12 * (last - first)
    below.set_xlim(1e3 * (first - margin), 1e3 * (last + margin))
    _style_axes(
        below,
        "x",
        f"The {_ordinal(shown + 1)} layer with a host cache, where the host attended longest",
    )
    below.set_xlabel("milliseconds since the program began", fontsize=9, color=GREY)
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def _draw_timeline(axes: Any, t: StepTimeline) -> None:
    dense_from = np.concatenate([[0.0], t.done_s])
    dense_to = np.concatenate([t.submit_s, [t.end_s]])
    program = (
        ("dense layers, window, plan", dense_from, dense_to, "#9fb3c8"),
        ("hand-over to the host", t.submit_s, t.share_s, "#111827"),
        ("device's share of the blocks", t.share_s, t.collect_s, COLOURS[1]),
        ("collect: wait, write", t.collect_s, t.done_s, COLOURS[3]),
    )
    for name, begin, end, colour in program:
        _spans(axes, begin, end - begin, 1.0, 0.62, colour, name)
    span, busy = _of(t, "span"), np.maximum(_of(t, "busy"), 1e-12)
    _spans(axes, t.submit_s, span, 0.16, 0.3, COLOURS[0], "host's threads, submit to last task")
    begin = t.submit_s.copy()
    for name, colour in (("scored", "#c9e6e2"), ("selected", "#64748b"), ("attended", COLOURS[2])):
        length = span * _of(t, name) / busy
        _spans(axes, begin, length, -0.16, 0.3, colour, f"of it {name}")
        begin = begin + length
    axes.set_yticks([1.0, 0.0], ["device's program", "host's threads"], fontsize=9)
    axes.set_ylim(-0.45, 1.45)


def _spans(
    axes: Any,
    begin: npt.NDArray[np.float64],
    length: npt.NDArray[np.float64],
    centre: float,
    height: float,
    colour: str,
    name: str,
) -> None:
    bars = np.stack([1e3 * begin, 1e3 * length], axis=1)
    axes.broken_barh(bars, (centre - height / 2, height), facecolors=colour, label=name)


def _of(timeline: StepTimeline, name: str) -> npt.NDArray[np.float64]:
    return timeline.host_times_s[:, host_ops.TIMES.index(name)]


def _ordinal(number: int) -> str:
    ending = (
        "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    )
    return f"{number}{ending}"


def _figure(size: tuple[float, float], title: str) -> Any:
    figure = require_matplotlib().Figure(figsize=size, layout="constrained", dpi=110)
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    return figure


def _map(
    axes: Any,
    values: npt.NDArray[np.float64],
    title: str,
    categories: dict[str, str] | None,
    labels: Sequence[str] | None,
) -> None:
    """A map `[layers, heads, steps]` with its key below: of categories, or on a log scale."""
    import matplotlib
    from matplotlib.colors import ListedColormap, LogNorm

    layers, heads, steps = values.shape
    if categories is None:
        most = max(float(np.nan_to_num(values).max()), 2.0 * BLOCK_TOKENS)
        look = {
            "cmap": matplotlib.colormaps["cividis_r"].with_extremes(bad=_NOTHING),
            "norm": LogNorm(BLOCK_TOKENS, most),
        }
    else:
        colours = ListedColormap(list(categories.values()))
        look = {"cmap": colours, "vmin": -0.5, "vmax": len(categories) - 0.5}
    image = axes.imshow(values.reshape(-1, steps), aspect="auto", interpolation="none", **look)
    key = axes.figure.colorbar(image, ax=axes, location="bottom", pad=0.02, aspect=30)
    key.outline.set_visible(False)
    if categories is not None:
        key.set_ticks(range(len(categories)), labels=list(categories))
    key.ax.tick_params(labelsize=8, colors=GREY, length=2)
    key.ax.minorticks_off()
    every = -(-layers // 12)
    shown = range(0, layers, every)
    axes.set_yticks([heads * i + (heads - 1) / 2 for i in shown], [str(i) for i in shown])
    for i in range(1, layers):
        axes.axhline(heads * i - 0.5, color="white", linewidth=1.5)
    axes.set_ylabel("layer, and in it the heads", fontsize=8, color=GREY)
    axes.tick_params(labelsize=8, colors=GREY, length=2)
    if labels is None:
        axes.set_xlabel("decode step", fontsize=8, color=GREY)
    else:
        axes.set_xticks(range(steps), labels, fontsize=7, family="monospace")
        for text in axes.get_xticklabels():
            text.set_rotation(90 if len(text.get_text()) > 1 else 0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=10, loc="left")


def _style_axes(axes: Any, grid: str, title: str = "") -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors=GREY, labelsize=9, length=2)
    axes.grid(axis=grid, color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
