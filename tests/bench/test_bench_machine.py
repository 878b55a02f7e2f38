"""The machine benchmark at a tiny size, on whatever machine this is."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from fluxion_jax.bench import random_arrays
from fluxion_jax.bench.machine import KERNEL_OF_COPIES, Settings, _cost_model, render, run
from fluxion_jax.bench.random_arrays import random_array
from fluxion_jax.cli import main
from fluxion_jax.policy import CostModel, parse_split

pytestmark = pytest.mark.native


def test_a_tiny_run_has_every_figure(tmp_path):
    report = run(Settings(array_bytes=2**22, repetitions=2, roundtrip_layers=(1, 2)))
    json.dumps(report, allow_nan=False)
    hosts = [r for r in report["rows"] if r["pipe"] == "host read"]
    threads = [r["threads"] for r in hosts]
    assert threads == sorted(set(threads))
    assert threads[0] == 1
    assert all(0 < r["gb_s"]["min"] <= r["gb_s"]["median"] for r in report["rows"])
    assert report["handover_us"] is not None
    assert "host read" in render(report)
    path = tmp_path / "bench-machine.json"
    path.write_text(json.dumps(report))
    cost = parse_split(f"model:{path}").cost
    rate = hosts[-1]["gb_s"] if report["together"] is None else report["together"]["host_gb_s"]
    assert cost.host_bytes_per_s == pytest.approx(1e9 * rate["median"])
    assert cost.device_fixed_s == CostModel().device_fixed_s


def test_random_arrays_differ_by_seed_and_cover_their_range():
    first, second = (np.asarray(random_array((5, 999), jnp.float32, "device", s)) for s in (1, 2))
    assert (first != second).mean() > 0.99
    assert first.min() < -0.99
    assert first.max() > 0.99
    assert abs(first.mean()) < 0.05
    bytes_ = np.asarray(random_array((9999,), jnp.int8, "pinned_host"))
    assert len(np.unique(bytes_)) == 256


def test_arrays_without_bytes_are_no_programs_results(monkeypatch):
    monkeypatch.setattr(random_arrays, "_program", lambda *_: pytest.fail("made by a program"))
    for kind in ("device", "pinned_host"):
        array = random_array((4, 2, 0, 16, 64), jnp.bfloat16, kind)
        assert (array.shape, array.dtype) == ((4, 2, 0, 16, 64), jnp.bfloat16)
        assert array.sharding.memory_kind == kind


def test_the_cost_model_promises_the_device_less_than_copies_reach():
    together = {f"{side}_gb_s": {"median": rate} for side, rate in (("host", 70.0), ("pcie", 50.0))}
    found = CostModel(**_cost_model(80.0, together, None))
    assert 0.9 < KERNEL_OF_COPIES < 0.95
    assert found == CostModel(70e9, KERNEL_OF_COPIES * 50e9)
    assert CostModel(**_cost_model(80.0, None, None)) == CostModel(80e9)


def test_the_command_names_itself(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "machine", "--help"])
    assert "--quick" in capsys.readouterr().out
