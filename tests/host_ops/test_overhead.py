"""What the native operations cost besides their work.

Each figure is the least of many runs: whatever else happens on the machine makes a run slower, and
nothing makes it faster than the code is.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import host_ops
from host_ops import TIMES, native
from tests.host_ops import cases

pytestmark = [pytest.mark.native, pytest.mark.slow]

# Twice or more what a machine needs whose cores nobody else uses.
CALL_S = 2e-6
LAYER_S = 10e-6
ROUNDS = 10
# 4096 tokens, 8 KV heads of 4 query heads each.
SHAPE = cases.Shape(
    num_blocks=256, head_dim=128, batch=1, kv_heads=8, dtype="bfloat16", flush_blocks=1
)


def case_of(boundary: int) -> cases.Case:
    return cases.random_case(SHAPE).with_work(
        boundary=np.full((1, 8), boundary),
        host_blocks=[256],
        granularity=np.full((1, 8), 16),
        k_units=np.full((1, 32), 13),
        shared=np.zeros((1, 8)),
    )


def append(cache: Any, case: cases.Case) -> tuple[Any, Any, Any]:
    *cache, status = host_ops.append(*cache, case.flush, implementation="native")
    return tuple(cache), status, jnp.zeros(len(TIMES))


def step(cache: Any, case: cases.Case) -> tuple[Any, Any, Any]:
    scale, name = case.scale, "native"
    tick = host_ops.submit(case.work, *cache, scale=scale, implementation=name)
    done = host_ops.collect(
        tick, case.work, *cache, case.flush, (), scale=scale, implementation=name
    )
    return (done.k, done.v, done.summaries), done.status, done.times


def least_s(link: Any, length: int, case: cases.Case, runs: int) -> tuple[float, float]:
    """Of a chain of calls the wall time, and of its links what was not a stage of a task."""

    def chain(cache: Any) -> tuple[Any, Any, Any]:
        status, times = jnp.zeros(1, jnp.int32), jnp.zeros(len(TIMES))
        for _ in range(length):
            cache, new_status, new_times = link(cache, case)
            status, times = status | new_status, times + new_times
        return cache, status, times

    program = jax.jit(chain, donate_argnums=0)
    cache = tuple(map(cases.to_host, (case.k, case.v, case.summaries)))
    wall_s, rest_s = [], []
    for _ in range(runs):
        start_s = time.perf_counter()
        cache, status, times = jax.block_until_ready(program(cache))
        wall_s.append(time.perf_counter() - start_s)
        assert status == host_ops.STATUS_OK
        seconds = dict(zip(TIMES, np.asarray(times, np.float64), strict=True))
        rest_s.append((seconds["waited"] + seconds["own"] - seconds["covered"]) / length)
    return min(wall_s), min(rest_s)


# A step is three calls: submit, start and collect.
@pytest.mark.parametrize(("link", "calls"), [(append, 1), (step, 3)])
def test_a_call_without_work_costs_next_to_nothing(link, calls):
    case = case_of(boundary=0)
    short_s = long_s = call_s = np.inf
    # On a shared machine all runs of one round may fall into a moment that is not quiet.
    for _ in range(ROUNDS):
        short_s = min(short_s, least_s(link, 32, case, runs=300)[0])
        long_s = min(long_s, least_s(link, 64, case, runs=300)[0])
        call_s = (long_s - short_s) / (32 * calls)
        print(f"{link.__name__}: {1e6 * call_s:.2f} us a call")
        if call_s < CALL_S:
            break
    assert call_s < CALL_S


def test_a_layer_costs_little_besides_scoring_selection_and_attention():
    before = native.info()["threads"]
    # With one thread, times that are summed over threads are those that pass.
    native.set_threads(1)
    rest_s = np.inf
    try:
        for _ in range(ROUNDS):
            rest_s = min(rest_s, least_s(step, 8, case_of(boundary=256), runs=100)[1])
            print(f"besides scoring, selection and attention: {1e6 * rest_s:.2f} us a layer")
            if rest_s < LAYER_S:
                break
    finally:
        native.set_threads(before)
    assert 0 < rest_s < LAYER_S
