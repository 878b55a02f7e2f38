"""Writes docs/results.md from the reports in benchmarks/results/: no figure is typed by hand.

    python tools/make_results_page.py            # write the page
    python tools/make_results_page.py --check    # fail if it is not what the reports say

A report is shown by the function that shows it on the command line, or a shorter one where that
would fill pages, with the figure beside it;
where there is none of a kind, its section says that nothing was measured yet.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"

INTRODUCTION = """# Measured results

<!-- Written by tools/make_results_page.py; do not edit. -->

Limits first: this page shows the reports under `benchmarks/results`. Other pages name a few
figures of single runs, each with how it was got; speed of large models is claimed from this page
only. Speed of whole decode steps belongs to the machine it was measured on; a small model on a
CPU shows fidelity, not speed. How each figure is measured is in [Benchmarks](benchmarks.md), and
what each column of an evaluation means in [Evaluation](evaluation.md). Every number below is read
from a report under `benchmarks/results`.
"""
# Title, how the files of its reports begin, and the module that shows such a report as text.
SECTIONS = (
    ("Quality of policies", "evaluate", "fluxion_jax.evaluation.report"),
    ("Calibrated predictors", "calibrat", "fluxion_jax.calibration.report"),
    ("What heads need", "heads", "fluxion_jax.evaluation.heads"),
    ("Whole decode steps", "bench-step", "fluxion_jax.bench.step_report"),
    ("Plans per head against fixed policies", "bench-policy", "fluxion_jax.bench.policy_report"),
    ("Host kernels against memory", "bench-host", "fluxion_jax.bench.host_report"),
    ("Device kernels against the buses", "bench-device", "fluxion_jax.bench.device"),
    ("Handing a layer to the host", "bench-roundtrip", "fluxion_jax.bench.roundtrip"),
    ("Ceilings of machines", "bench-machine", "fluxion_jax.bench.machine"),
    ("Prefill", "bench-prefill", "fluxion_jax.bench.prefill"),
    ("What integer selection loses", "bench-selection", "fluxion_jax.bench.selection"),
)


def machine(stamp: dict[str, Any]) -> str:
    """One line that names where a report comes from."""
    cpu, memory = stamp["cpu"], stamp["memory"]
    devices = [d for d in stamp["devices"]["devices"] if not d.startswith("cpu")]
    parts = [
        *devices,
        f"{cpu['allowed']} of {cpu['present']} CPUs, {cpu['model']}",
        f"{memory['total_bytes'] / 2**30:.0f} GiB of memory",
        f"Python {stamp['versions']['python']}, JAX {stamp['versions']['jax']}, "
        f"Flax {stamp['versions']['flax']}",
        f"load {stamp['load']:.1f}",
        f"commit {stamp['commit'][:7]}{' with changes' if stamp['dirty'] else ''}",
        stamp["date"][:10],
    ]
    return "Machine: " + "; ".join(parts) + "."


def page() -> str:
    """The whole page."""
    paths = sorted(RESULTS.glob("*.json"))
    lines = [INTRODUCTION]
    for title, prefix, module in SECTIONS:
        lines += [f"## {title}", ""]
        found = [path for path in paths if path.name.startswith(prefix)]
        for path in found:
            report = json.loads(path.read_text(encoding="utf-8"))
            shown_by = importlib.import_module(module)
            brief = getattr(shown_by, "render_brief", shown_by.render)
            text = brief(report).strip("\n")
            link = f"[`{path.name}`](../benchmarks/results/{path.name})"
            # Some are tables in Markdown already.
            shown = [text] if "\n|---" in text else ["```text", text, "```"]
            lines += [f"{link}. {machine(report['stamp'])}", "", *shown, ""]
            figure = path.with_suffix(".png").name
            if (RESULTS / figure).exists():
                lines += [f"![{title}](../benchmarks/results/{figure})", ""]
        paths = [path for path in paths if path not in found]
        if not found:
            lines += ["Not measured yet.", ""]
    if paths:
        lines += ["## Other reports", ""]
        lines += [f"- [`{path.name}`](../benchmarks/results/{path.name})" for path in paths] + [""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    if parser.parse_args().check:
        return int(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
