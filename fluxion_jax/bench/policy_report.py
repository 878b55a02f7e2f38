"""What plans per head gain over fixed policies, and how `fluxion bench policy` shows it."""

from __future__ import annotations

from typing import Any

PER_HEAD, GROUP = "fixed:16:0.05", "fixed:16:0.05:group"
PAPER_LIKE = "paper-like"
# What is required of the paper-like plans against the paper's own baseline, by case; and the goal.
REQUIRED_GAIN = {"llama-3.1-8b-32768-b4": 2.0, "llama-3.1-8b-131072-b4": 3.7}
GOAL_GAIN = 5.0
REQUIRED_OF_MODEL = 0.85
REQUIRED_PLANNING_US, GOAL_PLANNING_US = 40.0, 20.0
REQUIRED_OF_BYTES, REQUIRED_BEHIND, REQUIRED_RECOVERY_STEPS = 1.10, 1.03, 20


def gains(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every plan set against both baselines of its case, each in the best place of its summaries.

    Args:
      rows: of a report; rows of no baseline are left out.

    Returns:
      Per plan set and baseline: `case`, `plan`, `baseline`, `total` (step over step), `above_floor`
      (both less the dense floor), `bound` (of floor and bytes alone, nothing else taking time),
      `model` (of the model times), `of_model` (total over that) and the two rows' steps.
    """
    steps = [r for r in rows if r["kind"] == "steps" and r["split"] == "adaptive"]
    found = []
    for case in dict.fromkeys(r["case"] for r in steps):
        own = [r for r in steps if r["case"] == case]
        for name in dict.fromkeys(r["plan"] for r in own if r["predicts"]):
            ours = _best(r for r in own if r["plan"] == name and r["predicts"])
            per_head = [
                r
                for r in own
                if r["plan"] == PER_HEAD and r["union_factor"] == ours["union_factor"]
            ]
            group = [r for r in own if r["plan"] == GROUP]
            found += [_gain(_best(b), ours) for b in (per_head, group) if b]
    return found


def _best(rows: Any) -> dict[str, Any]:
    best: dict[str, Any] = min(rows, key=lambda r: r["step_s"]["median"])
    return best


def _gain(baseline: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    floor_s = ours["floor_s"]
    base_s, own_s = (r["step_s"]["median"] for r in (baseline, ours))
    model = baseline["model_s"] / ours["model_s"]
    above_s = own_s - floor_s
    return {
        "case": ours["case"],
        "plan": ours["plan"],
        "baseline": baseline["plan"],
        "summaries": [baseline["summaries"], ours["summaries"]],
        "step_s": [base_s, own_s],
        "total": base_s / own_s,
        "above_floor": (base_s - floor_s) / above_s if above_s > 0 else None,
        "bound": (floor_s + baseline["bytes_s"]) / (floor_s + ours["bytes_s"]),
        "model": model,
        "of_model": base_s / own_s / model,
    }


def scheduler(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The adaptive split against each side alone, with the same plans.

    Returns:
      Per case and plan: `of_bytes`, what the adaptive split takes beyond floor, hand-overs and
      selection over its bytes at both rates together, None where these take longer than the step;
      `of_bytes_with_rest`, the same beyond the floor alone; `behind`, its step over that of the
      better side.
    """
    found = []
    without = [r for r in rows if r["kind"] == "steps" and not r["predicts"]]
    keys = dict.fromkeys((r["case"], r["plan"], r["summaries"], r["union_factor"]) for r in without)
    for key in keys:
        same = {
            r["split"]: r
            for r in without
            if (r["case"], r["plan"], r["summaries"], r["union_factor"]) == key
        }
        if set(same) != {"adaptive", "host", "device"}:
            continue
        row = same["adaptive"]
        step_s = row["step_s"]["median"]
        beyond_s = step_s - row["floor_s"]
        attention_s = beyond_s - row["handover_s"] - row["selection_s"]
        sides = {side: same[side]["step_s"]["median"] for side in ("host", "device")}
        found.append(
            {
                "case": key[0],
                "plan": key[1],
                "of_bytes": attention_s / row["bytes_s"] if attention_s > 0 else None,
                "of_bytes_with_rest": beyond_s / row["bytes_s"],
                "behind": step_s / min(sides.values()),
                "step_s": {"adaptive": step_s, **sides},
            }
        )
    return found


def predictor(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What predicting takes of a layer: steps with it, less those of the same plans without."""
    found = []
    steps = [r for r in rows if r["kind"] == "steps" and r["split"] == "adaptive"]
    for ours in (r for r in steps if r["predicts"]):
        same = ("case", "plan", "summaries")
        for bare in (r for r in steps if not r["predicts"]):
            if all(bare[name] == ours[name] for name in same):
                more_s = ours["step_s"]["median"] - bare["step_s"]["median"]
                layer_us = 1e6 * more_s / ours["layers"]
                found.append({"case": ours["case"], "plan": ours["plan"], "layer_us": layer_us})
    return found


def render(report: dict[str, Any]) -> str:
    """The report as tables for a terminal."""
    rows = report["rows"]
    lines = ["plans; in all of them the blocks that a group reads together are imposed, see the"]
    lines += ["documentation; union: its blocks over those of the largest head"]
    lines += [f"  {name}: {text}" for name, text in report["plan_sets"].items()]
    lines += _steps(rows) + _gains(rows) + _parts(rows)
    if report["left_out"]:
        lines.append("not in this report: " + ", ".join(report["left_out"]))
    lines += [f"failed: {name}: {reason}" for name, reason in report["failed"].items()]
    return "\n".join(lines)


def _steps(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "times of a step in ms; reads: groups that read; budget: of their heads, % of the context",
        f"{'case':25s} {'plan':20s} {'sums':6s} {'split':8s} pred  reads budget union"
        "    p50    p99  floor  above  model of model  host MB   bus MB",
    ]
    for r in (r for r in rows if r["kind"] == "steps"):
        step, plan = r["step_s"], r["statistics"]
        lines.append(
            f"{r['case']:25s} {r['plan']:20s} {r['summaries']:6s} {r['split']:8s} "
            f"{'yes' if r['predicts'] else 'no':4s} {100 * plan['reading_groups']:5.0f}% "
            f"{100 * plan['budget_of_reading']:5.2f}% "
            f"{plan['union_factor'] * r['union_read_of_wanted']:5.2f} "
            f"{1e3 * step['median']:6.2f} {1e3 * step['p99']:6.2f} {1e3 * r['floor_s']:6.2f} "
            f"{1e3 * (step['median'] - r['floor_s']):6.2f} {1e3 * r['model_s']:6.2f} "
            f"{r['of_model']:8.2f} {r['host_bytes'] / 1e6:8.1f} {r['device_bytes'] / 1e6:8.1f}"
        )
    return lines


def _gains(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "gain: baseline's step over the plans' step; above: both less the floor; bound: of floor",
        "and bytes alone; model: of the model times",
        f"{'case':25s} {'plan':20s} {'baseline':20s}  gain  above  bound  model of model",
    ]
    for g in gains(rows):
        above = "-" if g["above_floor"] is None else f"{g['above_floor']:.2f}"
        line = (
            f"{g['case']:25s} {g['plan']:20s} {g['baseline']:20s} {g['total']:5.2f} {above:>6s} "
            f"{g['bound']:6.2f} {g['model']:6.2f} {g['of_model']:8.2f}"
        )
        required = REQUIRED_GAIN.get(g["case"])
        if g["plan"] == PAPER_LIKE and g["baseline"] == PER_HEAD and required:
            goal = f", goal {GOAL_GAIN:g}" if required == max(REQUIRED_GAIN.values()) else ""
            line += f"  gain of {required:g}{goal}: {_met(g['total'] >= required)}"
        else:
            line += f"  {REQUIRED_OF_MODEL:g} of the model: "
            line += _met(g["of_model"] >= REQUIRED_OF_MODEL)
        lines.append(line)
    return lines


def _parts(rows: list[dict[str, Any]]) -> list[str]:
    """Predictor, scheduler, recovery and idle time, where measured."""
    lines = []
    for r in (r for r in rows if r["kind"] == "planning"):
        plan_us, split_us = 1e6 * r["plan_s"]["median"], 1e6 * r["split_s"]
        lines.append(
            f"planning, {r['case']}: predicting and choosing take {plan_us:.1f} us a layer by "
            f"themselves, splitting {split_us:.1f} us; at most {REQUIRED_PLANNING_US:g} us "
            f"together, goal {GOAL_PLANNING_US:g}: "
            f"{_met(plan_us + split_us <= REQUIRED_PLANNING_US)}"
        )
    for p in predictor(rows):
        lines.append(
            f"predicting, {p['case']} {p['plan']}: steps take {p['layer_us']:.1f} us a layer "
            "longer than with the same plans and no predictor, which attend to the window meanwhile"
        )
    for s in scheduler(rows):
        of_bytes = s["of_bytes"]
        known = of_bytes is not None
        met = known and of_bytes <= REQUIRED_OF_BYTES and s["behind"] <= REQUIRED_BEHIND
        lines.append(
            f"scheduler, {s['case']} {s['plan']}: attention "
            f"{f'{of_bytes:.2f}' if known else 'an unknown part'} of its bytes over both rates "
            f"(at most {REQUIRED_OF_BYTES:g}), with hand-over and selection "
            f"{s['of_bytes_with_rest']:.2f}; {s['behind']:.3f} of the better side (at most "
            f"{REQUIRED_BEHIND:g}): {_met(met)}"
        )
    for r in (r for r in rows if r["kind"] == "recovery"):
        met = r["recovered_steps"] <= REQUIRED_RECOVERY_STEPS
        lines.append(
            f"recovery, {r['case']}: {r['threads'][0]} threads become {r['threads'][1]}; "
            f"{r['recovered_steps']} steps to {1e3 * r['steady_s']:.2f} ms (at most "
            f"{REQUIRED_RECOVERY_STEPS}): {_met(met)}"
        )
    for r in (r for r in rows if r["kind"] == "idle"):
        lines.append(
            f"GPU idle, {r['case']} {r['plan']}: {r['idle_fraction']:.1%} of the step, of which in "
            f"a kernel that waits for the host {r['waiting_fraction']:.1%}"
        )
    return lines


def _met(met: bool) -> str:
    return "met" if met else "NOT met"
