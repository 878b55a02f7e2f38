"""A calibration's report as text and as a figure."""

from __future__ import annotations

from typing import Any

from fluxion_jax.plotting import COLOURS, require_matplotlib

METHODS = {
    "predictor": "predictor",
    "per_head": "table per head",
    "last_step": "label of the step before",
    "constant": "one budget for all",
}


def render(report: dict[str, Any]) -> str:
    """Turns a report of `calibrate` into a table."""
    samples = report["samples"]
    lines = [
        f"calibrated on {samples['train']} samples, safety chosen on {samples['tuning']}, "
        f"rated on {samples['held_out']} of other texts",
        "",
        f"{'tolerance':>9}  {'method':<24}  {'class':>6}  {'short':>6}  {'missed':>6}  "
        f"{'left':>6}  {'given':>7}  {'needed':>7}  {'given/needed':>12}",
    ]
    for row in sorted(report["rows"], key=lambda r: r["tolerance"]):
        lines.append(
            f"{row['tolerance']:>9g}  {METHODS[row['method']]:<24}  {row['accuracy']:>6.1%}  "
            f"{row['under_budget']:>6.1%}  {row['missed']:>6.1%}  "
            f"{row['error_left']:>6.3f}  {row['given_fraction']:>7.2%}  "
            f"{row['needed_fraction']:>7.2%}  {row['over_provisioning']:>12.2f}"
        )
    if report["ablation"]:
        lines += ["", "without a family of features: given/needed (short) by tolerance"]
        whole = [row for row in report["rows"] if row["method"] == "predictor"]
        for family in dict.fromkeys(row["method"] for row in [*whole, *report["ablation"]]):
            cells = [
                f"{row['over_provisioning']:.2f} ({row['under_budget']:.1%})"
                for row in [*whole, *report["ablation"]]
                if row["method"] == family
            ]
            name = "with all families" if family == "predictor" else family
            lines.append(f"{name:<24}  " + "  ".join(cells))
    lines += [
        "",
        "class: streaming or retrieval told right; short: budgets below the smallest that keeps to",
        "the tolerance; missed: the same of heads that need more than the window; left: error",
        "beyond the tolerance, norm over a step's heads; given, needed: host bytes of the plans,",
        "and of plans that know what is needed, summaries included, as a share of all K/V",
    ]
    return "\n".join(lines)


def calibration_figure(report: dict[str, Any]) -> Any:
    """Budgets given and heads left short, by tolerance, of the predictor and its baselines.

    Returns:
      A matplotlib `Figure` of two panels.
    """
    figure = require_matplotlib().Figure(figsize=(10, 4.2), layout="constrained", dpi=150)
    axes = figure.subplots(1, 2)
    panels = (
        ("given_fraction", "host bytes, % of all K/V"),
        ("under_budget", "budgets that fall short, %; dashed: aimed at"),
    )
    for panel, (value, title) in zip(axes, panels, strict=True):
        for (method, name), colour in zip(METHODS.items(), COLOURS, strict=False):
            own = sorted(
                (r["tolerance"], r[value]) for r in report["rows"] if r["method"] == method
            )
            x, y = zip(*own, strict=True)
            panel.plot(x, [100 * v for v in y], "o-", color=colour, label=name, ms=4, lw=1.2)
        if value == "given_fraction":
            needed = sorted(
                (r["tolerance"], r["needed_fraction"])
                for r in report["rows"]
                if r["method"] == "predictor"
            )
            x, y = zip(*needed, strict=True)
            panel.plot(x, [100 * v for v in y], "k--", label="needed", lw=1)
            panel.set_yscale("log")
        else:
            target = 100 * report["settings"]["under_budget"]
            panel.axhline(target, color="black", linestyle="--", linewidth=1)
        panel.set_xscale("log")
        tolerances = sorted({row["tolerance"] for row in report["rows"]})
        panel.set_xticks(tolerances, [f"{t:g}" for t in tolerances])
        panel.set_xticks([], minor=True)
        panel.set_xlabel("tolerance of the output error", fontsize=9)
        panel.set_title(title, fontsize=11, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="#e4e7eb", linewidth=0.8)
    # Both panels have the same colours, and only the lower left of this one is always free.
    axes[0].legend(frameon=False, fontsize=8)
    return figure
