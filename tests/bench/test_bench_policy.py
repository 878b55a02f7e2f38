"""The policy benchmark at a tiny size: every figure is there and follows from measurements."""

from __future__ import annotations

import dataclasses
import gc
import json
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxion_jax.bench import machine, policy, roundtrip
from fluxion_jax.bench.idle import shares
from fluxion_jax.bench.policy_report import gains, predictor, render, scheduler
from fluxion_jax.bench.replayed import Replayed, random_predictor
from fluxion_jax.bench.step_programs import Stepper, random_cache, random_weights
from fluxion_jax.cli import main
from fluxion_jax.errors import FluxionError
from fluxion_jax.models.config import ModelConfig
from fluxion_jax.policy import ReplayPolicy, adaptive

pytestmark = [pytest.mark.native, pytest.mark.slow]
CASE = policy.Case("tiny", (6000, 4000), ("paper:0.5:0.1:2", "paper-like"), details=True)
TINY = policy.Settings(
    {"tiny": ModelConfig.tiny_llama()},
    (CASE,),
    calls=2,
    machine=machine.Settings(2**22, 2, None),
    roundtrip=roundtrip.Settings((1, 2), 3),
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    return folder, policy.run(TINY, folder)


def test_every_cell_has_its_figures(measured):
    _, report = measured
    json.dumps(report, allow_nan=False)
    assert report["failed"] == {}
    assert report["left_out"] == []
    steps = [r for r in report["rows"] if r["kind"] == "steps"]
    keys = [(r["plan"], r["summaries"], r["split"], r["predicts"]) for r in steps]
    group, first = policy.GROUP, CASE.sets[0]
    assert keys == [
        *((name, "device", "adaptive", True) for name in CASE.sets),
        *((group, "device", split, False) for split in policy.SPLITS),
        *((first, "device", split, False) for split in policy.SPLITS),
        (group, "host", "adaptive", False),
        (policy.PER_HEAD, "host", "adaptive", False),
    ]
    for row in steps:
        parts = [row[f"{part}_s"] for part in ("floor", "handover", "selection", "bytes")]
        assert row["model_s"] == pytest.approx(sum(parts))
        assert (row["selection_s"] > 0) == (row["summaries"] == "device")
        if row["split"] == "host":
            assert row["host_bytes"] > 0
            assert row["device_bytes"] == 0
        if row["split"] == "device":
            assert row["device_bytes"] > 0
            assert row["host_bytes"] == 0
    assert [r["kind"] for r in report["rows"] if r["kind"] != "steps"] == ["planning", "recovery"]


def test_recovery_begins_and_ends_with_the_threads_that_are_at_work(monkeypatch):
    # The ceilings were measured with more.
    rows = [{"pipe": "host read", "threads": n, "gb_s": {"median": 10.0 * n}} for n in (1, 4, 7)]
    bench = policy._Bench(TINY, None, lambda _: None, None)
    monkeypatch.setattr(bench, "cell", lambda *_: {"rows": rows})
    monkeypatch.setattr(policy.native, "info", lambda: {"threads": 6})
    measure = policy._Measure(bench, CASE, {}, {})
    assert measure._half_speed() == (6, 4)


def test_the_union_that_was_read_is_the_one_wanted(measured):
    _, report = measured
    for row in (r for r in report["rows"] if r["kind"] == "steps"):
        # Units of a tiny context are few, so that a step too many weighs much.
        assert row["union_read_of_wanted"] == pytest.approx(1.0, abs=0.12)


def test_the_report_shows_every_row_and_gain(measured):
    _, report = measured
    text = render(report)
    steps = [r for r in report["rows"] if r["kind"] == "steps"]
    found = gains(report["rows"])
    assert [(g["plan"], g["baseline"]) for g in found] == [
        (name, base) for name in CASE.sets for base in (policy.PER_HEAD, policy.GROUP)
    ]
    assert sum(line.startswith("tiny-4000-6000-b2") for line in text.splitlines()) == (
        len(steps) + len(found)
    )
    assert text.count("scheduler, ") == 2
    assert "recovery, tiny-4000-6000-b2: " in text
    assert "planning, tiny-4000-6000-b2: " in text
    assert "us a layer longer" in text


def test_a_second_run_measures_nothing(measured):
    folder, report = measured
    said = []
    assert policy.run(TINY, folder, said.append)["rows"] == report["rows"]
    assert said == []


def test_a_spent_budget_leaves_cells_out(measured, tmp_path):
    folder, _ = measured
    for name in ("machine", "roundtrip"):
        (tmp_path / f"policy-{name}.json").write_text((folder / f"policy-{name}.json").read_text())
    report = policy.run(TINY, tmp_path, budget_s=0.0)
    assert report["rows"] == []
    assert "not in this report: tiny-4000-6000-b2-floor" in render(report)


def test_without_its_floor_nothing_of_a_case_is_measured(measured, tmp_path, monkeypatch):
    folder, _ = measured
    for name in ("machine", "roundtrip"):
        (tmp_path / f"policy-{name}.json").write_text((folder / f"policy-{name}.json").read_text())
    tried = []
    monkeypatch.setattr(policy, "dense_floor", lambda *_: tried.append(0) or 1 / 0)
    monkeypatch.setattr(policy, "random_cache", lambda *_, **__: pytest.fail("a cache was made"))
    report = policy.run(TINY, tmp_path)
    assert report["rows"] == []
    assert list(report["failed"]) == ["tiny-4000-6000-b2-floor"]
    assert len(tried) == 1


def test_a_failed_cell_leaves_nothing_of_its_cache():
    """Of a large cache a second one does not fit beside the first."""
    bench = policy._Bench(TINY, None, lambda _: None, None)
    held = []

    def fails():
        stepper = bench.stepper_of(CASE, "device", True)
        held.extend(weakref.ref(x) for x in (stepper, *stepper.cache.host_arrays))
        raise FluxionError("expected a step, got none")

    gc.collect()
    gc.disable()
    try:
        assert bench.cell("steps", fails) is None
        assert [one() for one in held] == [None] * len(held)
    finally:
        gc.enable()
    assert len(held) > 1
    assert bench.cell("steps", lambda: pytest.fail("tried again")) is None


def test_the_command_measures_shows_and_shows_again(measured, tmp_path, monkeypatch, capsys):
    folder, _ = measured
    cells = tmp_path / "cells"
    cells.mkdir()
    for name in ("machine", "roundtrip"):
        (cells / f"policy-{name}.json").write_text((folder / f"policy-{name}.json").read_text())
    quick = dataclasses.replace(
        TINY, cases=(policy.Case("tiny", CASE.context_tokens, policy.QUICK.cases[0].sets),)
    )
    monkeypatch.setattr(policy, "QUICK", quick)
    assert main(["bench", "policy", "--quick", "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "bench-policy.json").read_text())
    assert report["failed"] == {}
    assert main(["bench", "policy", "--quick", "--case", "tiny-9-b1"]) != 0
    assert "cases out of tiny-4000-6000-b2, got tiny-9-b1" in capsys.readouterr().err
    assert {g["plan"] for g in gains(report["rows"])} == {"paper-like", *policy.OURS}
    assert len(gains(report["rows"])) == 2 * (1 + len(policy.OURS))
    file = str(tmp_path / "bench-policy.json")
    assert main(["bench", "policy", "--report", file]) == 0
    assert capsys.readouterr().out == shown


def _row(plan, step_s, **changes):
    row = {
        "kind": "steps",
        "case": "c",
        "plan": plan,
        "summaries": "host",
        "split": "adaptive",
        "predicts": plan == "ours",
        "union_factor": 2.0,
        "layers": 10,
        "step_s": {"median": step_s},
        "floor_s": 1.0,
        "handover_s": 0.25,
        "selection_s": 0.25,
        "bytes_s": 1.0,
        "model_s": 2.5,
    }
    return {**row, **changes}


def test_gains_compare_the_best_places_at_the_same_union():
    rows = [
        _row("ours", 3.0),
        _row("fixed:16:0.05", 9.0, model_s=7.5, bytes_s=5.0),
        _row("fixed:16:0.05", 4.0, union_factor=1.0),
        _row("fixed:16:0.05:group", 6.0, model_s=5.0, union_factor=1.0),
        _row("fixed:16:0.05:group", 5.0, model_s=4.0, union_factor=1.0, summaries="device"),
    ]
    per_head, group = gains(rows)
    assert per_head["total"] == pytest.approx(3.0)
    assert per_head["above_floor"] == pytest.approx(4.0)
    assert per_head["bound"] == pytest.approx(3.0)
    assert per_head["model"] == pytest.approx(3.0)
    assert per_head["of_model"] == pytest.approx(1.0)
    assert group["step_s"] == [5.0, 3.0]
    assert group["summaries"] == ["device", "host"]
    assert group["of_model"] == pytest.approx(5 / 3 / (4 / 2.5))


def test_the_scheduler_is_judged_by_its_bytes_and_by_the_better_side():
    rows = [
        _row("x", step, split=split)
        for split, step in (("adaptive", 2.6), ("host", 2.5), ("device", 4.0))
    ]
    (found,) = scheduler(rows)
    assert found["of_bytes"] == pytest.approx(1.1)
    assert found["of_bytes_with_rest"] == pytest.approx(1.6)
    assert found["behind"] == pytest.approx(1.04)
    rows[0]["step_s"] = {"median": 1.4}
    assert scheduler(rows)[0]["of_bytes"] is None
    assert scheduler(rows[:2]) == []


def test_predicting_is_what_steps_take_longer_with_it():
    bare = _row("ours", 2.0, predicts=False)
    (found,) = predictor([_row("ours", 3.0), bare, {**bare, "summaries": "device"}])
    assert found["layer_us"] == pytest.approx(1e5)


def test_the_predictor_executes_and_decides_nothing():
    config = ModelConfig.tiny_llama()
    weights = random_weights(config)
    plans = ReplayPolicy(
        np.asarray([1500], np.int32),
        np.full((1, 2, config.num_layers, config.num_kv_heads), 32, np.int32),
        np.full((1, 2, config.num_layers, config.num_heads), 64, np.int32),
    )
    blocks, products = [], []
    for predicts in (False, True):
        cache = random_cache(config, (1500,), "device", sketch=predicts)
        replayed = Replayed(
            plans, jnp.asarray(True), random_predictor(config) if predicts else None
        )
        stepper = Stepper(weights, cache)
        text = stepper.trace(replayed, adaptive()).lower().compile().as_text()
        products.append(text.count(" dot("))
        _, totals = stepper.call(replayed, adaptive(), 2)
        blocks.append(int((totals.host_blocks + totals.device_blocks).sum()))
    # Four products of the network in each layer, and those of the features.
    assert products[1] >= products[0] + 4 * config.num_layers
    assert blocks == [2 * 4 * config.num_layers * config.num_kv_heads] * 2


def _trace(*kernels):
    names = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0 H100"}},
        {"ph": "M", "name": "process_name", "pid": 2, "args": {"name": "/host:CPU"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 7, "args": {"name": "Stream #7"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 8, "args": {"name": "XLA Modules"}},
        {"ph": "X", "name": "module", "pid": 1, "tid": 8, "ts": 0, "dur": 900},
        {"ph": "X", "name": "python", "pid": 2, "tid": 7, "ts": 0, "dur": 900},
    ]
    return names + [
        {"ph": "X", "name": n, "pid": 1, "tid": 7, "ts": begin, "dur": dur}
        for n, begin, dur in kernels
    ]


def test_idle_time_is_what_no_working_kernel_covers():
    found = shares(_trace(("a", 0, 20), ("b", 10, 20), ("fluxion_exchange", 25, 35), ("a", 80, 20)))
    assert found["idle_fraction"] == pytest.approx(0.5)
    assert found["waiting_fraction"] == pytest.approx(0.3)
    assert list(found["kernels_s"]) == ["a", "fluxion_exchange", "b"]
    with pytest.raises(FluxionError, match="expected kernels in the trace"):
        shares(_trace())


def test_the_backend_is_known_before_idle_time_is_measured(measured):
    _, report = measured
    has_idle = any(r["kind"] == "idle" for r in report["rows"])
    assert has_idle == (jax.default_backend() == "gpu")
