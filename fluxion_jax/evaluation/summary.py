"""All tasks of a length in one row per policy: its score and bytes against the usual baselines."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from fluxion_jax.evaluation.metrics import bootstrap_interval

# What most published sparse decoders spend: a twentieth of the tokens in blocks of 16.
BASELINE = "fixed:16:0.05"


def summary_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per length and policy, over the samples of all tasks.

    Args:
      report: of `runner.evaluate`: its `rows` and `samples`.

    Returns:
      Per row `length_tokens`, `policy`, `tasks`, `samples`, `score` (mean over the tasks, 0 to 1),
      `host_bytes_per_token` (likewise), and against full attention (`full`) and, where it was
      evaluated, `fixed:16:0.05` (`baseline`): `bytes_ratio_*`, `difference_*` and the paired 95 %
      bootstrap `interval_*`. Where tasks have as many samples, each counts the same.
    """
    scores: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for sample in report["samples"]:
        scores[sample["length_tokens"]][sample["policy"]].append(sample["score"])
    found = []
    for length, of_policy in scores.items():
        own = [row for row in report["rows"] if row["length_tokens"] == length]
        num_tasks = len({row["task"] for row in own})
        cost = {
            policy: float(
                np.mean([row["host_bytes_per_token"] for row in own if row["policy"] == policy])
            )
            for policy in of_policy
        }
        references = {"full": next(iter(of_policy)), "baseline": BASELINE}
        for policy, values in of_policy.items():
            row: dict[str, Any] = {
                "length_tokens": length,
                "policy": policy,
                "tasks": num_tasks,
                "samples": len(values),
                "score": float(np.mean(values)),
                "host_bytes_per_token": cost[policy],
            }
            for name, reference in references.items():
                if reference in of_policy and cost[reference]:
                    differences = np.subtract(values, of_policy[reference])
                    row |= {
                        f"bytes_ratio_{name}": cost[policy] / cost[reference],
                        f"difference_{name}": float(differences.mean()),
                        f"interval_{name}": bootstrap_interval(differences.tolist()),
                    }
            found.append(row)
    return found


def render_summary(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [
        "| length | policy | tasks | samples | score | MiB/token | from full "
        f"| bytes of {BASELINE} | from {BASELINE} |",
        "|---:|---|---:|---:|---:|---:|---|---:|---|",
    ]
    for row in rows:
        ratio = row.get("bytes_ratio_baseline")
        lines.append(
            f"| {row['length_tokens']} | {row['policy']} | {row['tasks']} | {row['samples']} "
            f"| {100 * row['score']:.1f} | {row['host_bytes_per_token'] / 2**20:.2f} "
            f"| {_difference(row, 'full')} | {'' if ratio is None else f'{ratio:.2f} x'} "
            f"| {_difference(row, 'baseline')} |"
        )
    return lines


def _difference(row: dict[str, Any], name: str) -> str:
    if f"difference_{name}" not in row:
        return ""
    low, high = (100 * x for x in row[f"interval_{name}"])
    return f"{100 * row[f'difference_{name}']:+.2f} [{low:+.2f}, {high:+.2f}]"
