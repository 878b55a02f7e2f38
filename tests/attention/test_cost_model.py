"""Splits by a cost model: both sides end together, ranges are worth their hand-over."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fluxion_jax as fx
from fluxion_jax.policy import CostModel, modelled, parse_split, split_at
from fluxion_jax.policy.cost_model import MIN_RANGE_BYTES
from tests.attention.helpers import filled, new_tokens, step

BLOCK_BYTES = 8192


def host_bytes(cost: CostModel, wanted: np.ndarray, scanned: np.ndarray | int = 0) -> np.ndarray:
    """What the cut gives to the host, if each task's selection is spread evenly."""
    blocks = np.full(len(wanted), 10**6, np.int32)
    boundary = jax.jit(
        lambda w, s: modelled(cost).boundaries(jnp.asarray(blocks), w, BLOCK_BYTES, s)
    )(jnp.asarray(wanted, jnp.int32), scanned)
    size = np.asarray(wanted) * float(BLOCK_BYTES) + np.asarray(scanned)
    return np.asarray(boundary) / blocks[:, None] * size


@pytest.mark.parametrize("seed", range(5))
def test_both_sides_end_together(seed):
    rng = np.random.default_rng(seed)
    cost = CostModel(*rng.uniform(20e9, 90e9, 2), *rng.uniform(10e-6, 60e-6, 2))
    wanted = rng.integers(1000, 5000, (2, 8))
    scanned = rng.integers(0, 2**20, (2, 8)).astype(np.int32)
    host = host_bytes(cost, wanted, scanned).sum()
    device = (wanted * BLOCK_BYTES + scanned).sum() - host
    host_s = cost.host_fixed_s + host / cost.host_bytes_per_s
    device_s = cost.device_fixed_s + device / cost.pcie_bytes_per_s
    # Whole ranges of blocks cannot meet exactly; 64 KiB are a few microseconds here.
    assert abs(host_s - device_s) < 5e-6
    assert cost.seconds(float(host + device), "model") == pytest.approx(
        max(host_s, device_s), abs=5e-6
    )


def test_fixed_costs_keep_little_work_on_the_cheaper_side():
    wanted = np.full((1, 8), 4)
    assert host_bytes(CostModel(host_fixed_s=200e-6), wanted).sum() == 0
    everything = wanted.sum() * BLOCK_BYTES
    assert host_bytes(CostModel(device_fixed_s=200e-6), wanted).sum() == everything


@pytest.mark.parametrize("total", [1.0, 1e5, 1e6, 1e8])
@pytest.mark.parametrize("fixed", [(40e-6, 30e-6), (200e-6, 0.0), (0.0, 200e-6)])
def test_the_modelled_time_is_that_of_the_longer_side(total, fixed):
    cost = CostModel(50e9, 25e9, *fixed)
    share, ahead = cost.host_part()
    host = float(np.clip((total + ahead) * share, 0.0, total))
    host_s = cost.host_fixed_s + host / 50e9 if host else 0.0
    device_s = cost.device_fixed_s + (total - host) / 25e9 if host < total else 0.0
    assert cost.seconds(total, "model") == pytest.approx(max(host_s, device_s), rel=1e-5)
    assert cost.seconds(total, "host") == cost.host_fixed_s + total / 50e9
    assert cost.seconds(total, "device") == cost.device_fixed_s + total / 25e9
    assert cost.seconds(0.0, "model") == 0.0


def test_a_shared_task_has_at_least_the_least_range_on_either_side():
    for tokens in range(1, 400, 7):
        wanted = np.array([[tokens, 3 * tokens]])
        size = wanted * BLOCK_BYTES
        host = host_bytes(CostModel(host_fixed_s=0.0, device_fixed_s=0.0), wanted)
        shared = (host > 1) & (host < size - 1)
        assert shared.sum() <= 1
        assert (host[shared] > MIN_RANGE_BYTES * 0.99).all()
        assert ((size - host)[shared] > MIN_RANGE_BYTES * 0.99).all()


def test_largest_tasks_go_to_the_host_first():
    wanted = np.array([[100, 4000, 200, 300]])
    host = host_bytes(CostModel(host_fixed_s=0.0, device_fixed_s=0.0), wanted)
    assert host[0, 1] > 0
    assert host[0, [0, 2, 3]].sum() == 0


def test_rates_are_data_and_outputs_do_not_depend_on_them():
    compiled = step(fx.Execution(dense_below_tokens=0), 0.125)
    outputs, shares = [], []
    # A range must be worth its hand-over, so even the slowest side needs no more than nothing.
    for cost in (
        CostModel(),
        CostModel(host_bytes_per_s=1e9, host_fixed_s=1.0),
        CostModel(pcie_bytes_per_s=1e9, device_fixed_s=1.0),
    ):
        cache = filled([1100, 400, 700])
        q, k, v = new_tokens(cache, 6)
        out, cache, stats = compiled(cache, q, k, v, fx.full(), modelled(cost))
        cache.check()
        outputs.append(out)
        shares.append((int(stats.host_blocks.sum()), int(stats.device_blocks.sum())))
    for out in outputs:
        np.testing.assert_allclose(out, outputs[0], atol=1e-5)
    assert shares[1][0] == shares[2][1] == 0
    assert all(sum(share) == sum(shares[0]) > 0 for share in shares)
    programs = compiled.compilations()
    cache = filled([1100, 400, 700])
    compiled(cache, *new_tokens(cache, 6), fx.full(), modelled(CostModel(3e9, 4e9, 0.0, 0.0)))
    assert compiled.compilations() == programs


def test_names_of_splits(tmp_path, monkeypatch):
    assert parse_split("model").cost == CostModel()
    path = tmp_path / "bench-machine.json"
    own = CostModel(host_bytes_per_s=5e9, host_fixed_s=0.0)
    path.write_text(json.dumps({"cost_model": dataclasses.asdict(own)}))
    assert parse_split(f"model:{path}").cost == own
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_split("adaptive:~/bench-machine.json").cost == own
    with pytest.raises(fx.ConfigError, match="'adaptive:FILE' or a host fraction"):
        parse_split("models")
    for numbers in ({"speed": 3}, {"host_bytes_per_s": 5e9}, {}):
        path.write_text(json.dumps({"cost_model": numbers}))
        with pytest.raises(fx.ConfigError, match="write one with fluxion bench machine"):
            parse_split(f"model:{path}")
    for missing in (tmp_path / "none.json", tmp_path):
        with pytest.raises(fx.ConfigError, match=f"cost_model of .* in {missing}, got none"):
            parse_split(f"model:{missing}")


@pytest.mark.parametrize(
    ("field", "value"),
    [("host_bytes_per_s", 0.0), ("device_fixed_s", -1.0), ("host_fixed_s", float("nan"))],
)
def test_a_rate_out_of_range_is_refused(field, value):
    with pytest.raises(fx.ConfigError, match=f"expected {field} of at least"):
        CostModel(**{field: value})


def test_a_whole_share_leaves_nothing_to_the_device():
    wanted = jnp.asarray([[0, 7, 3]], jnp.int32)
    boundary = split_at(1.0).boundaries(jnp.asarray([9]), wanted, BLOCK_BYTES)
    assert np.asarray(boundary).tolist() == [[9, 9, 9]]
