"""The step benchmark at a tiny size: every figure is there, adds up, and is kept."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from fluxion_jax.bench import machine, roundtrip, step
from fluxion_jax.bench.step_programs import (
    CHUNK_STEPS,
    Stepper,
    random_cache,
    random_weights,
)
from fluxion_jax.bench.step_report import render
from fluxion_jax.models.config import ModelConfig
from fluxion_jax.policy import CostModel, adaptive, modelled, parse_policy, split_at

pytestmark = [pytest.mark.native, pytest.mark.slow]
TINY = step.Settings(
    {"tiny": ModelConfig.tiny_llama()},
    (step.Case("tiny", (2000, 1500), ("fixed:16:0.05", "fixed:32:0.1:group"), baselines=True),),
    calls=2,
    machine=machine.Settings(2**22, 2, None),
    roundtrip=roundtrip.Settings((1, 2), 3),
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    return folder, step.run(TINY, folder)


def test_every_cell_has_its_figures(measured):
    _, report = measured
    json.dumps(report, allow_nan=False)
    sparse = [r for r in report["rows"] if r["kind"] == "sparse"]
    assert [r["split"] for r in sparse] == 2 * 2 * ["model", "adaptive", "host", "device"]
    assert report["left_out"] == []
    for row in sparse:
        assert 0 < row["step_s"]["min"] <= row["step_s"]["median"] <= row["step_s"]["p99"]
        parts = [row[f"{part}_s"] for part in ("floor", "handover", "selection", "bytes")]
        assert row["model_s"] == pytest.approx(sum(parts))
        assert row["of_model"] == pytest.approx(row["step_s"]["median"] / row["model_s"])
        assert (row["selection_s"] > 0) == (row["summaries"] == "device")
    assert [r["place"] for r in report["rows"] if r["kind"] == "full"] == ["pinned_host", "device"]
    assert report["failed"] == {}
    headlines = 2 * len(TINY.cases[0].policies)
    text = render(report).splitlines()
    assert len(text) == 6 + len(report["rows"]) + headlines
    assert sum(line.endswith("times as long") for line in text) == headlines
    for line in text[6 : 6 + len(sparse)]:
        beyond, trip, select, rest = map(float, line.split()[-6:-2])
        assert beyond == pytest.approx(trip + select + rest, abs=0.3)


def test_the_start_of_a_call_is_what_its_steps_do_not_take(monkeypatch):
    stepper = object.__new__(Stepper)
    calls = []

    def call(policy, split, steps=CHUNK_STEPS):
        calls.append(steps)
        return 0.25 + 0.5 * steps, ()

    monkeypatch.setattr(stepper, "call", call)
    timed = stepper.timed(None, None, 3)
    assert timed.start_s == pytest.approx(0.25)
    assert timed.step_s == pytest.approx([0.5 + 0.25 / CHUNK_STEPS] * 3)
    assert timed.steps == 3 * CHUNK_STEPS
    assert calls.count(CHUNK_STEPS) == 1 + 3
    assert set(calls) == {1, CHUNK_STEPS}


def test_bytes_go_where_the_split_sends_them(measured):
    _, report = measured
    sparse = [r for r in report["rows"] if r["kind"] == "sparse"]
    for row in sparse:
        if row["split"] == "host":
            assert row["host_bytes"] > 0
            assert row["device_bytes"] == 0
        if row["split"] == "device":
            assert row["device_bytes"] > 0
            assert row["host_bytes"] == 0
    by_key = {(r["summaries"], r["policy"], r["split"]): r for r in sparse}
    for policy in TINY.cases[0].policies:
        host, device = (by_key["host", policy, side] for side in ("host", "device"))
        # A selection per head is of the host's and the device's own bits, which are the same.
        assert host["host_bytes"] == pytest.approx(device["device_bytes"], rel=0.05)
        scanned = by_key["device", policy, "host"]["host_bytes"]
        assert scanned < host["host_bytes"]


def test_no_rate_is_shown_where_the_floor_hides_it(measured):
    _, report = measured
    row = next(r for r in report["rows"] if r["kind"] == "sparse")
    floor_s = row["floor_s"]
    shown = []
    for factor in (0.9, 1.04, 2.0):
        step_s = {**row["step_s"], "median": factor * floor_s}
        text = render({"rows": [{**row, "step_s": step_s}], "left_out": [], "failed": {}})
        shown.append(text.splitlines()[-1].split()[-7])
    total = row["host_bytes"] + row["device_bytes"]
    assert shown == ["-", "-", f"{total / floor_s / 1e9:.1f}"]


def test_a_second_run_measures_nothing(measured):
    folder, report = measured
    said = []
    again = step.run(TINY, folder, said.append)
    assert said == []
    assert again["rows"] == report["rows"]


def test_a_spent_budget_leaves_cells_out(measured, tmp_path):
    folder, _ = measured
    for name in ("machine", "roundtrip"):
        (tmp_path / f"step-{name}.json").write_text((folder / f"step-{name}.json").read_text())
    report = step.run(TINY, tmp_path, budget_s=0.0)
    assert report["rows"] == []
    assert len(report["left_out"]) == 1 + 2 + 16 + 2
    assert "not in this report" in render(report)


def test_a_cell_that_fails_costs_no_other(measured, tmp_path, monkeypatch):
    folder, report = measured
    for path in folder.iterdir():
        if "full" not in path.name:
            (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(step._Bench, "_full", lambda *_: 1 / 0)
    again = step.run(TINY, tmp_path)
    names = [f"tiny-1500-2000-b2-full-{place}" for place in ("pinned_host", "device")]
    assert list(again["failed"]) == names
    assert again["failed"][names[1]].startswith("ZeroDivisionError: division")
    assert len(again["rows"]) == len(report["rows"]) - 2
    assert f"failed: {names[1]}: ZeroDivisionError" in render(again)


def test_without_its_floor_a_case_has_no_sparse_steps(measured, tmp_path, monkeypatch):
    folder, report = measured
    for path in folder.iterdir():
        if "full" in path.name or "b2" not in path.name:
            (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(step, "dense_floor", lambda *_: 1 / 0)
    monkeypatch.setattr(step._Bench, "_stepper", lambda *_: pytest.fail("a step was measured"))
    again = step.run(TINY, tmp_path)
    assert list(again["failed"]) == ["tiny-1500-2000-b2-floor"]
    assert again["rows"] == [r for r in report["rows"] if r["kind"] == "full"]


def test_splits_by_the_ceilings_differ_in_what_they_learn():
    rates = {"host_at_once": 70.0, "pcie_at_once": 50.0}
    cost = CostModel(70e9, machine.KERNEL_OF_COPIES * 50e9)
    assert step._split("model", rates) == modelled(cost)
    assert step._split("adaptive", rates) == adaptive(cost)
    assert [step._split(side, rates) for side in ("host", "device")] == [split_at(1), split_at(0)]


def test_the_model_time_is_by_the_plain_rates():
    figures = {f"{name}_gb_s": {"median": 10.0 * i} for i, name in enumerate(("host", "pcie"), 7)}
    figures["sum_gb_s"] = {"median": 149.0}
    rows = [
        {"pipe": pipe, "gb_s": {"median": rate}}
        for pipe, rate in (("host read", 75.0), ("host to device", 85.0))
    ]
    rates = step.rates_gb_s({"rows": rows, "together": figures})
    assert rates == {
        "host": 75.0,
        "device": 85.0,
        "model": 149.0,
        "adaptive": 149.0,
        "host_at_once": 70.0,
        "pcie_at_once": 80.0,
    }


def test_every_cell_begins_with_nothing_learnt(monkeypatch):
    begun = []

    def timed(self, policy, split, calls):
        begun.append(np.asarray(self.cache.pace).tolist())
        self.cache = self.cache.replace(pace=jnp.ones_like(self.cache.pace))
        raise ZeroDivisionError

    monkeypatch.setattr(Stepper, "timed", timed)
    bench = step._Bench(TINY, None, lambda _: None, None)
    rates = {"host_at_once": 70.0, "pcie_at_once": 50.0}
    for split in step.SPLITS:
        with pytest.raises(ZeroDivisionError):
            bench._step(TINY.cases[0], "host", "full", split, rates)
    assert begun == [[0.0, 0.0]] * 4


def test_calls_start_from_the_same_context_with_weights_of_every_layer():
    config = ModelConfig.tiny_llama()
    weights = random_weights(config)
    leaves = [
        np.asarray(x)
        for x in (weights.params["layers"][i]["attention"]["q"]["kernel"][...] for i in (0, 1))
    ]
    assert (leaves[0] != leaves[1]).any()
    cache = random_cache(config, (700,), "host")
    address = cache.k[0].unsafe_buffer_pointer()
    stepper = Stepper(weights, cache)
    for _ in range(2):
        stepper.call(parse_policy("fixed:16:0.05"), split_at(1.0))
        assert np.asarray(stepper.cache.lengths).tolist() == [732]
    kept = random_cache(config, (700,), "device", stepper.cache)
    assert kept.k[0].unsafe_buffer_pointer() == address
