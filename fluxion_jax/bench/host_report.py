"""What `fluxion bench host` found, as a table, and what is required of it, met or not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]

# Requirements are about the shape of Llama 3.1 8B.
SHAPE = (128, 4)


@dataclasses.dataclass(frozen=True)
class Requirement:
    """One figure of the report that must reach a bound in every row it is about.

    Attributes:
      figure: what is bounded, in words.
      of_row: the figure of a row, None where the row does not have it.
      required: the bound.
      goal: what is aimed at beyond it, or None.
      at_most: whether the figure must not exceed the bound, rather than reach it.
      applies: which of the rows count, given the row and the largest number of threads.
    """

    figure: str
    of_row: Callable[[Row], float | None]
    required: float
    goal: float | None = None
    at_most: bool = False
    applies: Callable[[Row, int], bool] = lambda row, threads: row["threads"] == threads

    def met(self, value: float, bound: float) -> bool:
        """Whether a figure keeps to a bound."""
        return value <= bound if self.at_most else value >= bound


REQUIREMENTS = (
    Requirement(
        "attention, share of the ceiling, units of 32 tokens and more",
        lambda row: float(row["attention_of_ceiling"]),
        0.75,
        0.9,
        applies=lambda row, threads: row["threads"] == threads and row["granularity"] >= 32,
    ),
    Requirement(
        "attention, share of the ceiling, units of 16 tokens",
        lambda row: float(row["attention_of_ceiling"]),
        0.65,
        0.8,
        applies=lambda row, threads: row["threads"] == threads and row["granularity"] == 16,
    ),
    Requirement(
        "scoring, share of the ceiling", lambda row: float(row["scoring_of_ceiling"]), 0.75, 0.9
    ),
    Requirement(
        "attention over its fastest comparator", lambda row: row.get("attention_over_fastest"), 4.0
    ),
    Requirement(
        "scoring over its fastest comparator", lambda row: row.get("scoring_over_fastest"), 4.0
    ),
    Requirement(
        "selection, share of scoring",
        lambda row: float(row["selection_of_scoring"]["median"]),
        0.15,
        at_most=True,
    ),
    Requirement(
        "rest of a layer in us, all threads",
        lambda row: float(row["rest_us"]["median"]),
        10.0,
        at_most=True,
    ),
    Requirement(
        "rest of a layer in us, one thread",
        lambda row: float(row["rest_us"]["median"]),
        10.0,
        at_most=True,
        applies=lambda row, threads: row["threads"] == 1,
    ),
)


def requirements(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Each requirement with the worst figure found, and whether it is met.

    Args:
      report: what `fluxion_jax.bench.host.run` returns.

    Returns:
      By requirement `figure`, `value` (the worst median of the rows it is about, unrounded), the
      `granularity` and `threads` of that row, `required`, `goal` and whether they are `met` and
      `goal_met`. Of what was not measured in full, `value` and `met` are None.
    """
    threads = report["threads"]
    units = report["settings"]["granularities"]
    rows = [row for row in report["rows"] if (row["head_dim"], row["group"]) == SHAPE]
    found = []
    for item in REQUIREMENTS:
        wanted = [
            (unit, count)
            for count in sorted({1, threads})
            for unit in units
            if item.applies({"granularity": unit, "threads": count}, threads)
        ]
        values = {
            (row["granularity"], row["threads"]): value
            for row in rows
            if item.applies(row, threads) and (value := item.of_row(row)) is not None
        }
        complete = bool(wanted) and set(wanted) <= values.keys()
        where = (max if item.at_most else min)(values, key=values.__getitem__) if complete else None
        found.append(_judged(item, where, values[where] if where else None))
    noop = Requirement("a call without work in us", lambda row: None, 2.0, at_most=True)
    call = report["noop_call_us"]
    found.append(_judged(noop, None, call["median"] if call else None))
    return found


def _judged(item: Requirement, where: tuple[int, int] | None, value: float | None) -> Row:
    unit, threads = where or (None, None)
    return {
        "figure": item.figure,
        "value": value,
        "granularity": unit,
        "threads": threads,
        "at_most": item.at_most,
        "required": item.required,
        "goal": item.goal,
        "met": None if value is None else item.met(value, item.required),
        "goal_met": None if value is None or item.goal is None else item.met(value, item.goal),
    }


def render(report: dict[str, Any]) -> str:
    """The report as a table for a terminal."""
    lines = [
        "GB/s of useful bytes, medians; in brackets the share of the streaming read",
        " H  G unit threads  ceiling       attention         scoring selection    rest imbalance",
    ]
    for r in report["rows"]:
        lines.append(
            f"{r['head_dim']:3d} {r['group']:2d} {r['granularity']:4d} {r['threads']:6d} "
            f"{r['ceiling_gb_s']['median']:8.1f} "
            f"{r['attention_gb_s']['median']:8.1f} ({r['attention_of_ceiling']:.2f}) "
            f"{r['scoring_gb_s']['median']:8.1f} ({r['scoring_of_ceiling']:.2f}) "
            f"{r['selection_of_scoring']['median']:9.1%} {r['rest_us']['median']:5.1f}us "
            f"{r['imbalance_us']['median']:7.0f}us"
        )
        for stage in ("attention", "scoring"):
            if others := r.get(f"{stage}_comparators_gb_s"):
                speeds = ", ".join(f"{name} {speed:.1f}" for name, speed in others.items())
                lines.append(
                    f"    {stage}: {r[f'{stage}_over_fastest']:.1f}x the fastest of the same work; "
                    f"{speeds}"
                )
    if report["noop_call_us"]:
        lines.append(f"a call without work: {report['noop_call_us']['median']:.2f} us")
    lines += [f"not measured: {name}" for name in report["left_out"]]
    lines.append(f"required of head size {SHAPE[0]}, group {SHAPE[1]}: the worst row's median")
    lines += [_line(item) for item in report["requirements"]]
    return "\n".join(lines)


def _line(item: Row) -> str:
    bound = f"{'at most' if item['at_most'] else 'at least'} {item['required']:g}"
    if item["met"] is None:
        return f"  not measured  {item['figure']}: {bound}"
    # Three places: a figure that misses its bound by less looks equal to it, and is still "missed".
    text = (
        f"  {'met   ' if item['met'] else 'MISSED'}  {item['figure']}: {item['value']:.3f}, {bound}"
    )
    if item["granularity"] is not None:
        text += f" (unit {item['granularity']}, {item['threads']} threads)"
    if item["goal"] is not None:
        text += f"; goal {item['goal']:g} {'met' if item['goal_met'] else 'missed'}"
    return text
