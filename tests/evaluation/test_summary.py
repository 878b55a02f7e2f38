"""The summary over tasks: means, ratios and paired differences by hand."""

import pytest

from fluxion_jax.evaluation.report import render, render_brief
from fluxion_jax.evaluation.summary import BASELINE, summary_rows


def _report(scores, cost):
    """`scores[policy][task]` lists one score per sample, all at one length."""
    samples = [
        {"length_tokens": 4096, "policy": policy, "task": task, "score": score}
        for task in ("a", "b")
        for i in range(2)
        for policy, tasks in scores.items()
        for score in [tasks[task][i]]
    ]
    rows = [
        {
            "length_tokens": 4096, "policy": policy, "task": task, "samples": 2,
            "score": sum(tasks[task]) / 2, "difference": 0.0, "interval": (0.0, 0.0),
            "same_prefix": 1.0, "read_fraction": 0.5, "host_bytes_per_token": cost[policy] + extra,
        }
        for policy, tasks in scores.items()
        for task, extra in (("a", -10.0), ("b", 10.0))
    ]  # fmt: skip
    settings = {"model": "m", "policies": list(scores)}
    report = {"settings": settings, "rows": rows, "text_rows": [], "samples": samples}
    return {**report, "summary": summary_rows(report)}


def test_means_ratios_and_paired_differences():
    scores = {
        "full": {"a": [1.0, 1.0], "b": [1.0, 0.0]},
        BASELINE: {"a": [1.0, 0.0], "b": [0.0, 0.0]},
        "oracle:0.1": {"a": [1.0, 1.0], "b": [0.0, 0.0]},
    }
    report = _report(scores, {"full": 1000.0, BASELINE: 100.0, "oracle:0.1": 40.0})
    full, baseline, oracle = report["summary"]
    assert [row["policy"] for row in report["summary"]] == list(scores)
    assert full["score"] == 0.75
    assert full["tasks"] == 2
    assert full["samples"] == 4
    assert full["bytes_ratio_full"] == 1.0
    assert baseline["difference_full"] == -0.5
    assert baseline["interval_baseline"] == (0.0, 0.0)
    assert oracle["host_bytes_per_token"] == 40.0
    assert oracle["bytes_ratio_baseline"] == pytest.approx(0.4)
    assert oracle["bytes_ratio_full"] == pytest.approx(0.04)
    assert oracle["difference_baseline"] == 0.25
    low, high = oracle["interval_baseline"]
    assert low == 0.0
    assert 0.25 < high <= 0.75
    text = render(report)
    assert "| 4096 | oracle:0.1 | 2 | 4 | 50.0 | 0.00 | -25.00 [" in text
    assert "| 0.40 x | +25.00 [+0.00, " in text
    brief = render_brief(report)
    assert "| 0.40 x | +25.00 [+0.00, " in brief
    assert brief.endswith("| score of full | 4096 |\n|---|---:|\n| a | 100.0 |\n| b | 50.0 |")


def test_without_the_baseline_only_full_attention_is_compared():
    report = _report({"full": {"a": [1.0, 1.0], "b": [1.0, 1.0]}}, {"full": 10.0})
    (row,) = report["summary"]
    assert "difference_full" in row
    assert "difference_baseline" not in row
    assert "| 4096 | full | 2 | 4 | 100.0 | 0.00 | +0.00 [+0.00, +0.00] |  |  |" in render(report)
