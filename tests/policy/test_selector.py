from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import fluxion_jax as fx
from fluxion_jax.policy.selector import select_granularity

SIZES = (16, 32, 64, 128)


def brute_force(budgets, host, layout):
    """Granularities, budgets and clips of one row: all granularities of each group are tried."""
    group = len(budgets) // layout.num_kv_heads
    granularity, chosen, clipped = [], [], []
    for first in range(0, len(budgets), group):
        costs = []
        for d, size in enumerate(SIZES):
            wanted = [-(-min(max(b[d], 0), host) // size) * size for b in budgets[first:][:group]]
            read = min(sum(wanted), host)
            summaries = -(-host // size) * 2 * layout.head_dim * (read > 0)
            weight = 1 if layout.summaries == "host" else 1 / 16
            token_bytes = 2 * layout.head_dim * layout.jax_dtype.itemsize
            costs.append((read * token_bytes + weight * summaries, -size, wanted))
        _, negative, wanted = min(costs)
        d = SIZES.index(-negative)
        granularity.append(-negative)
        chosen += wanted
        clipped += [b[d] > host > 0 for b in budgets[first:][:group]]
    return granularity, chosen, clipped


@pytest.mark.parametrize(
    ("kv_heads", "group", "dtype", "summaries"),
    [(2, 1, "bfloat16", "host"), (3, 3, "float32", "host"), (2, 4, "bfloat16", "device")],
)
def test_the_choice_reads_the_fewest_bytes(kv_heads, group, dtype, summaries):
    layout = fx.KVLayout(1, kv_heads, 64, dtype, summaries=summaries)
    rng = np.random.default_rng(kv_heads)
    hosts = np.asarray([0, 16, 176, 1008, 4096, 131072], np.int32)
    seen = set()
    for _ in range(40):
        base = np.exp2(rng.uniform(0, 14, (len(hosts), kv_heads * group, 1)))
        growth = rng.uniform(0, 1.2, base.shape) * np.arange(4)
        budgets = np.ceil(base * np.exp2(growth)).astype(np.int32)
        budgets *= rng.random(base.shape) < 0.6
        got = select_granularity(jnp.asarray(budgets), jnp.asarray(hosts), layout)
        for row, host in enumerate(hosts):
            expected = brute_force(budgets[row].tolist(), int(host), layout)
            for name, a, b in zip("gbc", got, expected, strict=True):
                np.testing.assert_array_equal(a[row], b, err_msg=name)
        seen |= set(np.asarray(got[0]).ravel().tolist())
    assert seen == set(SIZES)


def test_a_group_that_streams_reads_nothing_and_equal_costs_go_to_the_coarsest():
    layout = fx.KVLayout(1, 2, 64, "bfloat16")
    budgets = np.zeros((1, 4, 4), np.int32)
    granularity, chosen, clipped = select_granularity(
        jnp.asarray(budgets), jnp.asarray([4096]), layout
    )
    assert granularity.tolist() == [[128, 128]]
    assert not np.asarray(chosen).any()
    assert not np.asarray(clipped).any()


def test_huge_budgets_do_not_overflow():
    layout = fx.KVLayout(1, 1, 256, "float32")
    budgets = np.full((1, 8, 4), 2**30, np.int32)
    for host in itertools.accumulate([2**20, 2**20]):
        granularity, chosen, clipped = select_granularity(
            jnp.asarray(budgets), jnp.asarray([host], jnp.int32), layout
        )
        assert granularity.tolist() == [[128]]
        assert chosen.tolist() == [[host] * 8]
        assert np.asarray(clipped).all()
