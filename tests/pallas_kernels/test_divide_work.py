"""A plan as units and boundaries: the kernel, and XLA's operations, against plain loops."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fluxion_jax as fx
from fluxion_jax.division import divide
from fluxion_jax.policy import CostModel, modelled, parse_split
from fluxion_jax.status import STATUS_PLAN
from pallas_kernels import UnsupportedImplementationError, divide_work

SIZES = (16, 32, 64, 128)
EXECUTIONS = [
    pytest.param("xla", id="xla"),
    pytest.param("interpreted", id="interpreted"),
    pytest.param("triton", id="gpu", marks=pytest.mark.gpu),
]


def in_a_loop(size, blocks, share, ahead, least):
    """Largest first, until the host has its part."""
    total = size.sum()
    left = host = np.clip((total + ahead) * share, 0.0, total)
    cut = np.where(host >= total, blocks, 0)
    for task in sorted(np.flatnonzero(size), key=lambda t: (-size[t], t)):
        part = min(left, size[task])
        left -= part
        if part < least or size[task] - part < least:
            part = size[task] if 2 * part >= size[task] else 0.0
        cut[task] = (
            blocks[task] if part >= size[task] else np.round(part / size[task] * blocks[task])
        )
    return cut


def a_plan(batch, kv_heads, group, seed=0):
    rng = np.random.default_rng(seed)
    budgets = rng.integers(-40, 6000, (batch, kv_heads * group))
    budgets[rng.random(budgets.shape) < 0.3] = 0
    budgets[0, 0] = 2**31 - 1
    granularity = rng.choice(SIZES, (batch, kv_heads))
    return fx.Plan(
        granularity=jnp.asarray(granularity, jnp.int32),
        budget_tokens=jnp.asarray(budgets, jnp.int32),
        shared=jnp.asarray(rng.random((batch, kv_heads)) < 0.5),
    )


def in_loops(plan, host_blocks, everything, layout):
    """Units of heads, and blocks and bytes of tasks, one after the other."""
    granularity, shared = np.asarray(plan.granularity), np.asarray(plan.shared)
    batch, kv_heads = granularity.shape
    budgets = np.asarray(plan.budget_tokens).reshape(batch, kv_heads, -1)
    k_units = np.zeros(budgets.shape, int)
    size = np.zeros((batch, kv_heads))
    for b in range(batch):
        for k in range(kv_heads):
            unit = int(granularity[b, k]) if granularity[b, k] in SIZES else 16
            units = math.ceil(host_blocks[b] / (unit // 16))
            for g, budget in enumerate(budgets[b, k]):
                wanted = math.ceil(max(int(budget), 0) / unit)
                k_units[b, k, g] = units if everything[b] else min(wanted, units)
            mine = k_units[b, k]
            read = (mine.max() if shared[b, k] else mine.sum()) * unit // 16
            size[b, k] = min(read, host_blocks[b]) * layout.block_bytes
            if layout.summaries == "host" and mine.max() > 0 and mine.min() < units:
                size[b, k] += units * layout.unit_summary_bytes
    return k_units.reshape(batch, -1), size


def ranked_units(plan, host_blocks, k_units):
    """Units of tasks in which some head wants some of them and not every head wants all."""
    units = -(-host_blocks[:, None] // (np.asarray(plan.granularity) // 16))
    mine = k_units.reshape(*units.shape, -1)
    return np.where((mine.max(axis=-1) > 0) & (mine.min(axis=-1) < units), units, 0)


def run(execution, plan, host_blocks, everything, split, layout, monkeypatch):
    if execution == "interpreted":
        monkeypatch.setattr(
            "pallas_kernels.divide_work", functools.partial(divide_work, interpret=True)
        )
    # A function of its own: of `divide` itself JAX would remember what it traced for another one.
    program = jax.jit(lambda *operands: divide(*operands, layout))
    return program(plan, jnp.asarray(host_blocks), jnp.asarray(everything), split)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("summaries", ["host", "device"])
@pytest.mark.parametrize(
    ("batch", "kv_heads", "group"), [(1, 1, 1), (3, 2, 7), (4, 8, 4), (5, 3, 16)]
)
def test_equals_loops(execution, summaries, batch, kv_heads, group, monkeypatch):
    # Powers of two, so that sums are exact in any order.
    layout = fx.KVLayout(1, kv_heads, 128, "bfloat16", summaries=summaries)
    host_blocks = np.asarray([640, 0, 7, 333, 4096][:batch], np.int32)
    everything = np.asarray([False, False, True, False, False][:batch])
    plan = a_plan(batch, kv_heads, group)
    k_units, size = in_loops(plan, host_blocks, everything, layout)
    blocks = np.repeat(host_blocks, kv_heads)
    cost = CostModel(2.0**36, 2.0**35, 2.0**-16, 2.0**-15)
    for split in (modelled(cost), *map(parse_split, (0.0, 0.375, 1.0, "host", "device"))):
        got = run(execution, plan, host_blocks, everything, split, layout, monkeypatch)
        np.testing.assert_array_equal(got.k_units, k_units, err_msg=str(split))
        np.testing.assert_array_equal(got.granularity, plan.granularity)
        assert not np.asarray(got.status).any()
        np.testing.assert_array_equal(got.ranked_units, ranked_units(plan, host_blocks, k_units))
        if split.sides != "both":
            wanted = blocks if split.sides == "host" else 0 * blocks
        elif split.cost is None:
            without = in_loops(plan, host_blocks, everything, layout_without_summaries(layout))[1]
            share = float(split.host_fraction)
            wanted = in_a_loop(without.reshape(-1), blocks, share, 0.0, 0)
        else:
            ahead = (cost.device_fixed_s - cost.host_fixed_s) * cost.pcie_bytes_per_s
            wanted = in_a_loop(size.reshape(-1), blocks, np.float32(2 / 3), ahead, 65536)
        # A half may fall to either side where the share itself is rounded.
        boundary = np.asarray(got.boundary).reshape(-1)
        np.testing.assert_allclose(boundary, wanted, atol=1, err_msg=str(split))
        assert (boundary != wanted).mean() < 0.1


def layout_without_summaries(layout):
    return fx.KVLayout(1, layout.num_kv_heads, layout.head_dim, "bfloat16", summaries="device")


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_tasks_without_work_go_where_everything_goes(execution, monkeypatch):
    layout = fx.KVLayout(1, 2, 64, "bfloat16", summaries="device")
    host_blocks, everything = np.asarray([7], np.int32), np.zeros(1, bool)
    budgets = {"nothing": [0, 0], "one": [32, 0]}
    wanted = {
        ("nothing", 0.0): [7, 7],
        ("one", 0.0): [0, 0],
        ("one", 0.5): [4, 0],
        ("one", 1.0): [7, 7],
    }
    for (name, share), boundary in wanted.items():
        plan = fx.Plan(
            jnp.full((1, 2), 16), jnp.asarray([budgets[name]], jnp.int32), jnp.zeros((1, 2), bool)
        )
        split = parse_split(share)
        got = run(execution, plan, host_blocks, everything, split, layout, monkeypatch)
        assert got.boundary.tolist() == [boundary], (name, share)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_an_unknown_granularity_is_told_and_takes_the_smallest(execution, monkeypatch):
    layout = fx.KVLayout(1, 3, 64, "bfloat16")
    plan = a_plan(2, 3, 2)
    faulty = np.asarray(plan.granularity).copy()
    faulty[0, 1], faulty[1, 2], faulty[1, 0] = 0, -16, 48
    known = np.isin(faulty, SIZES)
    plan = plan._replace(granularity=jnp.asarray(faulty))
    host_blocks, everything = np.asarray([100, 60], np.int32), np.zeros(2, bool)
    got = run(execution, plan, host_blocks, everything, parse_split(0.5), layout, monkeypatch)
    np.testing.assert_array_equal(got.status, np.where(known, 0, STATUS_PLAN))
    np.testing.assert_array_equal(got.granularity, np.where(known, faulty, 16))
    np.testing.assert_array_equal(got.k_units, in_loops(plan, host_blocks, everything, layout)[0])


def test_too_many_tasks_are_left_to_xla(monkeypatch):
    layout = fx.KVLayout(1, 1, 64, "bfloat16")
    host_blocks, everything = np.full(129, 50, np.int32), np.zeros(129, bool)
    plan = a_plan(129, 1, 2)
    got = run("interpreted", plan, host_blocks, everything, parse_split(0.5), layout, monkeypatch)
    np.testing.assert_array_equal(got.k_units, in_loops(plan, host_blocks, everything, layout)[0])
    with pytest.raises(UnsupportedImplementationError, match="at most 128 tasks, got 129"):
        divide_work(
            plan.granularity, plan.budget_tokens, plan.shared.astype(int), host_blocks,
            everything.astype(int), jnp.float32(0.5), jnp.float32(0.0), granularities=SIZES,
            unknown_status=1, sides="both", block_bytes=1, scanned_bytes=0, least=0, interpret=True,
        )  # fmt: skip


def test_no_kernel_without_a_gpu():
    if jax.default_backend() == "gpu":
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(UnsupportedImplementationError, match="expected a CUDA device"):
        divide_work(
            *(jnp.zeros((1, 1), jnp.int32),) * 3, *(jnp.zeros(1, jnp.int32),) * 2,
            jnp.float32(0.5), jnp.float32(0.0), granularities=SIZES, unknown_status=1,
            sides="both", block_bytes=1, scanned_bytes=0, least=0,
        )  # fmt: skip
