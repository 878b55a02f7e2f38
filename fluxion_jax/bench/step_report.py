"""What a decode step should cost, and how `fluxion bench step` shows what it does cost."""

from __future__ import annotations

from typing import Any

from fluxion_jax.models.config import ModelConfig
from host_ops import TIMES

_LEAST_OF_FLOOR = 0.05


def costs(
    row: dict[str, Any],
    floor: dict[str, Any],
    alone: dict[str, Any],
    handover: dict[str, Any],
    rates: dict[str, float],
    config: ModelConfig,
) -> dict[str, Any]:
    """The model time of a step, from parts that were measured each by itself.

    It is the dense floor, for each layer a hand-over and (where the device selects) scoring and
    selection, and the bytes over the rate of what reads them: a side alone, or both at once.

    Args:
      row: figures of the step.
      floor: of steps without a host part.
      alone: of scoring and selection; None where the host does it.
      handover: the report of the round trip.
      rates: in GB/s, by split.
      config: the model's sizes.

    Returns:
      `floor_s`, `handover_s`, `selection_s`, `bytes_s`, `model_s`, `of_model` (the step over it)
      and `overhead_layer_s`, what a layer takes beyond floor and bytes.
    """
    handed_over = row["summaries"] == "device"
    layer_us = next(
        r["layer_us"] for r in handover["rows"] if (r["selection"] == "handed over") == handed_over
    )
    selection = alone["selection_s"]["median"] if alone["selection_s"] else 0.0
    parts = {
        "floor_s": floor["step_s"]["median"],
        "handover_s": config.num_layers * max(0.0, layer_us) * 1e-6,
        "selection_s": config.num_layers * selection,
        "bytes_s": (row["host_bytes"] + row["device_bytes"]) / rates[row["split"]] / 1e9,
    }
    model_s = sum(parts.values())
    step_s = row["step_s"]["median"]
    beyond = (step_s - parts["floor_s"] - parts["bytes_s"]) / config.num_layers
    return {
        **parts,
        "model_s": model_s,
        "of_model": step_s / model_s,
        "overhead_layer_s": beyond,
    }


def render(report: dict[str, Any]) -> str:
    """The report as tables for a terminal."""
    lines = [
        "times of a step in ms, start: of a program, once for all steps of a call; of model: step",
        "over the time that its parts suggest; beyond: us a layer beyond floor and bytes, which is",
        "trip (a hand-over alone), select (scoring and selection by the device, alone) and rest;",
        "waited, own: us a layer that the stream waited for the host, and that submit and collect",
        "took",
        f"{'case':24s} {'sums':6s} {'policy':20s} {'split':8s}    p50    p99  start  floor  model"
        "  of model  host MB   bus MB   GB/s  beyond   trip select   rest  waited    own",
    ]
    for r in report["rows"]:
        if r["kind"] == "full":
            continue
        layers = r["layers"]
        # Older reports lack the last ones.
        known = TIMES[: len(r["host_times_s"])]
        times = dict(zip(known, r["host_times_s"], strict=True))
        total = r["host_bytes"] + r["device_bytes"]
        step = r["step_s"]
        beyond_floor_s = step["median"] - r["floor_s"]
        # Next to a floor that is as large, what is left is noise and not a time.
        known = beyond_floor_s > _LEAST_OF_FLOOR * r["floor_s"]
        rate = f"{total / beyond_floor_s / 1e9:.1f}" if known else "-"
        # Older reports do not have it.
        start = f"{1e3 * r['start_s']:.2f}" if "start_s" in r else "-"
        rest_s = (step["median"] - r["model_s"]) / layers
        lines.append(
            f"{r['case']:24s} {r['summaries']:6s} {r['policy']:20s} {r['split']:8s} "
            f"{1e3 * step['median']:6.2f} {1e3 * step['p99']:6.2f} {start:>6s} "
            f"{1e3 * r['floor_s']:6.2f} {1e3 * r['model_s']:6.2f} {r['of_model']:9.2f} "
            f"{r['host_bytes'] / 1e6:8.1f} {r['device_bytes'] / 1e6:8.1f} {rate:>6s} "
            f"{1e6 * r['overhead_layer_s']:7.1f} {1e6 * r['handover_s'] / layers:6.1f} "
            f"{1e6 * r['selection_s'] / layers:6.1f} {1e6 * rest_s:6.1f} "
            f"{1e6 * times['waited'] / layers:7.1f} "
            f"{1e6 * times['own'] / layers:6.1f}"
        )
    for r in report["rows"]:
        if r["kind"] == "full":
            lines.append(_full_line(r))
    if report["left_out"]:
        lines.append("not in this report: " + ", ".join(report["left_out"]))
    lines += [f"failed: {name}: {reason}" for name, reason in report["failed"].items()]
    lines += _headlines(report["rows"])
    return "\n".join(lines)


def _headlines(rows: list[dict[str, Any]]) -> list[str]:
    """What the best sparse step of a case is worth, next to attention to everything."""
    lines = []
    for case in dict.fromkeys(r["case"] for r in rows):
        steps = [r for r in rows if r["case"] == case and r["kind"] == "sparse"]
        full = [r for r in rows if r["case"] == case and r["kind"] == "full" and r["step_s"]]
        for policy in dict.fromkeys(r["policy"] for r in steps):
            best = min(
                (r for r in steps if r["policy"] == policy), key=lambda r: r["step_s"]["median"]
            )
            step_s = best["step_s"]["median"]
            lines += [
                f"{case} {policy}: {1e3 * step_s:.2f} ms (summaries on the {best['summaries']}, "
                f"split {best['split']}); {_PLACES[r['place']]} {1e3 * r['step_s']['median']:.2f} "
                f"ms, {r['step_s']['median'] / step_s:.1f} times as long"
                for r in full
            ]
    return lines


_PLACES = {
    "pinned_host": "KV streamed",
    "device": "KV resident",
    "transformers": "transformers, KV offloaded",
}


def _full_line(row: dict[str, Any]) -> str:
    name = _PLACES[row["place"]]
    if row["step_s"] is None:
        return f"{row['case']:24s} {name}: {row['reason']}"
    step_s = row["step_s"]["median"]
    return (
        f"{row['case']:24s} {name}: {1e3 * step_s:.2f} ms a step, {row['kv_bytes'] / 1e9:.1f} GB, "
        f"{row['kv_bytes'] / step_s / 1e9:.1f} GB/s"
    )
