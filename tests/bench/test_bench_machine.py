"""The machine benchmark at a tiny size, on whatever machine this is."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from fluxion_jax.bench.machine import Settings, render, run
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


def test_the_command_names_itself(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "machine", "--help"])
    assert "--quick" in capsys.readouterr().out
