"""What an evaluation found, as rows and as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fluxion_jax.evaluation.metrics import bootstrap_interval
from fluxion_jax.evaluation.summary import render_summary

Cells = Sequence[Sequence[dict[str, Any]]]


def answer_rows(task: str, length_tokens: int, cells: Cells) -> list[dict[str, Any]]:
    """One row per policy.

    Args:
      task: name of the task.
      length_tokens: of its samples.
      cells: per batch what `answers.answer` returned; the first policy is the reference.
    """
    reference = _values(cells, 0, "score")
    rows = []
    for i, first in enumerate(cells[0]):
        score = _values(cells, i, "score")
        rows.append(
            {
                "task": task,
                "length_tokens": length_tokens,
                "policy": first["policy"],
                "samples": len(score),
                "score": float(score.mean()),
                "difference": float((score - reference).mean()),
                "interval": bootstrap_interval((score - reference).tolist()),
                "same_prefix": float(_values(cells, i, "same_prefix").mean()),
                **_bytes(cells, i),
            }
        )
    return rows


def text_rows(length_tokens: int, cells: Cells) -> list[dict[str, Any]]:
    """One row per policy, from what `real_text.compare` returned per batch."""
    reference = _values(cells, 0, "log_perplexity")
    rows = []
    for i, first in enumerate(cells[0]):
        found = _values(cells, i, "log_perplexity")
        kl = _values(cells, i, "kl")
        rows.append(
            {
                "length_tokens": length_tokens,
                "policy": first["policy"],
                "stretches": len(found),
                "perplexity": math.exp(found.mean()),
                "log_perplexity_difference": float((found - reference).mean()),
                "interval": bootstrap_interval((found - reference).tolist()),
                "kl": float(kl.mean()),
                "kl_interval": bootstrap_interval(kl.tolist()),
                "agreement": float(_values(cells, i, "agreement").mean()),
                **{name: _measured(cells, i, name) for name in ("recall", "output_error")},
                **_bytes(cells, i),
            }
        )
    return rows


def _values(cells: Cells, policy: int, name: str) -> np.ndarray:
    return np.concatenate([np.asarray(batch[policy][name], np.float64) for batch in cells])


def _measured(cells: Cells, policy: int, name: str) -> float | None:
    """A mean over batches and layers; None where no layer was looked into."""
    values = [batch[policy][name] for batch in cells]
    return None if None in values else float(np.mean(values))


def _bytes(cells: Cells, policy: int) -> dict[str, float]:
    """Means over batches, each as often as it has samples."""
    counts = [len(b[policy]["text" if "text" in b[policy] else "kl"]) for b in cells]
    return {
        name: float(np.average([b[policy][name] for b in cells], weights=counts))
        for name in ("host_bytes_per_token", "read_fraction")
    }


def render(report: dict[str, Any]) -> str:
    """The report as tables for a terminal; they are Markdown as well."""
    return _joined([*_head(report), _task_table(report["rows"]), _text_table(report["text_rows"])])


def render_brief(report: dict[str, Any]) -> str:
    """The report for a page: over all tasks, and by task only for the reference."""
    return _joined([*_head(report), _reference_table(report), _text_table(report["text_rows"])])


def _joined(parts: Sequence[Sequence[str]]) -> str:
    """Parts with an empty line between them."""
    return "\n\n".join("\n".join(part) for part in parts if part)


def _head(report: dict[str, Any]) -> list[list[str]]:
    settings = report["settings"]
    text = (
        f"{settings['model']}; scores out of 100, differences from {settings['policies'][0]} with "
        "paired 95 % bootstrap intervals."
    )
    several = len({row["task"] for row in report["rows"]}) > 1
    return [[text], render_summary(report["summary"]) if several else []]


def _reference_table(report: dict[str, Any]) -> list[str]:
    reference = report["settings"]["policies"][0]
    scores = {
        (row["task"], row["length_tokens"]): 100 * row["score"]
        for row in report["rows"]
        if row["policy"] == reference
    }
    if not scores:
        return []
    tasks, lengths = (list(dict.fromkeys(key[i] for key in scores)) for i in (0, 1))
    return [
        f"| score of {reference} | " + " | ".join(str(n) for n in lengths) + " |",
        "|---|" + "---:|" * len(lengths),
        *(
            f"| {task} | "
            + " | ".join(f"{scores[task, n]:.1f}" if (task, n) in scores else "" for n in lengths)
            + " |"
            for task in tasks
        ),
    ]


def _task_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = [
        "| task | length | policy | samples | score | difference | same prefix | MiB/token "
        "| K/V read |",
        "|---|---:|---|---:|---:|---|---:|---:|---:|",
    ]
    for row in rows:
        low, high = (100 * x for x in row["interval"])
        lines.append(
            f"| {row['task']} | {row['length_tokens']} | {row['policy']} | {row['samples']} "
            f"| {100 * row['score']:.1f} | {100 * row['difference']:+.1f} "
            f"[{low:+.1f}, {high:+.1f}] | {row['same_prefix']:.1%} | {_cost(row)} |"
        )
    return lines


def _text_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = [
        "| real text | policy | stretches | perplexity | log difference | KL (nats) "
        "| same token | recall | out. error | MiB/token | K/V read |",
        "|---:|---|---:|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        low, high = row["interval"]
        lines.append(
            f"| {row['length_tokens']} | {row['policy']} | {row['stretches']} "
            f"| {row['perplexity']:.3f} | {row['log_perplexity_difference']:+.4f} "
            f"[{low:+.4f}, {high:+.4f}] | {row['kl']:.4f} | {row['agreement']:.1%} "
            f"| {_or_none(row['recall'], 3)} | {_or_none(row['output_error'], 4)} | {_cost(row)} |"
        )
    return lines


def _or_none(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _cost(row: dict[str, Any]) -> str:
    return f"{row['host_bytes_per_token'] / 2**20:.2f} | {row['read_fraction']:.1%}"
