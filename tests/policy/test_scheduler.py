from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fluxion_jax as fx
import host_ops
from fluxion_jax.policy import CostModel, adaptive, modelled, parse_split
from fluxion_jax.policy.scheduler import corrected, observe
from tests.generation import tiny

BLOCK_BYTES = 8192
LAYERS = 4


def simulate(
    split, true: CostModel, wanted: np.ndarray, union: float, pace: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """One layer on a machine with the true rates: seconds, the new pace, and the host's blocks.

    Of the upper bound of a task's blocks only a share is read, because selections overlap.
    """
    blocks = np.full(len(wanted), 8192, np.int32)
    boundary = np.asarray(boundaries(split, jnp.asarray(pace), blocks, wanted))
    read = wanted * union
    host = (boundary / blocks[:, None] * read).sum() * BLOCK_BYTES
    device = read.sum() * BLOCK_BYTES - host
    host_s = true.host_fixed_s + host / true.host_bytes_per_s if host else 0.0
    device_s = true.device_fixed_s + device / true.pcie_bytes_per_s if device else 0.0
    times = np.zeros(len(host_ops.TIMES), np.float32)
    times[host_ops.TIMES.index("span")] = host_s
    times[host_ops.TIMES.index("waited")] = max(0.0, host_s - device_s)
    pace = np.asarray(learn(jnp.asarray(pace), split.cost, host, device, times))
    return max(host_s, device_s), pace, boundary


boundaries = jax.jit(
    lambda split, pace, blocks, wanted: split.at_pace(pace).boundaries(blocks, wanted, BLOCK_BYTES)
)
learn = jax.jit(observe)


@pytest.mark.parametrize("union", [1.0, 0.4])
@pytest.mark.parametrize("host_factor", [2.0, 1.0, 0.5, 0.25])
def test_both_rates_are_found_and_a_slower_host_is_relieved(host_factor, union):
    model = CostModel()
    wanted = np.random.default_rng(0).integers(50, 500, (4, 8)).astype(np.int32)
    split, pace = adaptive(model), np.zeros(2, np.float32)
    bytes_read = wanted.sum() * union * BLOCK_BYTES
    for host_rate, pcie_rate in ((70e9, 30e9), (70e9 * host_factor, 30e9)):
        true = CostModel(host_rate, pcie_rate, 1e-6, 1e-6)
        best = bytes_read / (host_rate + pcie_rate)
        took = []
        for _ in range(20):
            total = 0.0
            for _ in range(LAYERS):
                seconds, pace, _ = simulate(split, true, wanted, union, pace)
                total += seconds
            took.append(total / LAYERS)
        one_sided = min(bytes_read / host_rate, bytes_read / pcie_rate)
        assert took[-1] <= 1.10 * best
        assert took[-1] <= 1.03 * one_sided
    # The uncorrected model would stay where it was.
    fixed_s, _, _ = simulate(modelled(model), true, wanted, union, np.zeros(2, np.float32))
    assert took[-1] <= 1.01 * fixed_s


def test_a_group_that_streams_has_no_task_and_the_largest_goes_to_the_host_first():
    wanted = np.asarray([[0, 300, 40, 0]], np.int32)
    model = CostModel(host_bytes_per_s=200e9, pcie_bytes_per_s=10e9)
    _, _, boundary = simulate(adaptive(model), model, wanted, 1.0, np.zeros(2, np.float32))
    assert boundary[0].tolist() == [0, 8192, 0, 0] or boundary[0, 1] > 0.8 * 8192
    assert boundary[0, 0] == boundary[0, 3] == 0


def test_little_work_and_clocks_that_stand_still_teach_nothing():
    pace = jnp.asarray([0.3, -0.2], jnp.float32)
    times = np.full(len(host_ops.TIMES), 1e-3, np.float32)
    np.testing.assert_array_equal(observe(pace, CostModel(), 1000.0, 1000.0, times), pace)
    nothing = np.zeros_like(times)
    np.testing.assert_array_equal(observe(pace, CostModel(), 1e6, 1e6, nothing), pace)
    moved = observe(pace, CostModel(), 1e12, 1e12, times)
    assert (jnp.abs(moved - pace) <= 6.0 / 8 + 0.1).all()


def test_a_device_that_comes_after_the_host_is_taken_for_slower():
    times = np.zeros(len(host_ops.TIMES), np.float32)
    times[host_ops.TIMES.index("span")] = 1e-3
    cost = CostModel(75e9, 46e9, 0.0, 0.0)
    # 100 MB in at least a millisecond: at most 100 GB/s, which is no news.
    np.testing.assert_allclose(
        observe(jnp.zeros(2), cost, jnp.float32(0), jnp.float32(1e8), times), [0, -0.25 / 8]
    )
    slower = observe(jnp.zeros(2), cost, jnp.float32(0), jnp.float32(1e7), times)
    assert slower[0] == 0
    assert slower[1] == pytest.approx(np.log2(1e10 / 46e9) / 8, rel=1e-4)


def test_names():
    assert parse_split("adaptive").adapts
    assert not parse_split("model").adapts
    with pytest.raises(fx.ConfigError, match="'adaptive:FILE'"):
        parse_split("adapt")
    cost = corrected(CostModel(100e9, 40e9), jnp.asarray([1.0, -1.0]))
    assert (cost.host_bytes_per_s, cost.pcie_bytes_per_s) == (200e9, 20e9)


def test_a_generation_adapts_and_stays_right():
    rows = tiny.prompts()
    expected = tiny.generate(tiny.llama(), rows, policy="full", max_new_tokens=20)
    # The model believes in a machine with a device bus as fast as it is slow here.
    cost = CostModel(host_bytes_per_s=1e9, pcie_bytes_per_s=1e9, host_fixed_s=0, device_fixed_s=0)
    result = tiny.generate(
        tiny.llama(), rows, policy="full", max_new_tokens=20, split=adaptive(cost)
    )
    for got, want in zip(result.tokens, expected.tokens, strict=True):
        np.testing.assert_array_equal(got, want)
    assert np.asarray(result.cache.pace).any()
    forked = result.cache.fork([0, 0])
    np.testing.assert_array_equal(forked.pace, result.cache.pace)
