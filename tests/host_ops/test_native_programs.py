"""The native operations inside compiled programs: in place, in parallel, after failures."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from host_ops import HOST, ffi, native
from host_ops.types import (
    STATUS_INVALID,
    STATUS_NOT_IN_PLACE,
    STATUS_OK,
    STATUS_TIMEOUT,
    TIMES,
    Tick,
)
from tests.host_ops import cases
from tests.host_ops.test_in_place import full_size_copies, pointers

pytestmark = pytest.mark.native

SHAPE = cases.Shape(num_blocks=72)
PINNED = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0], memory_kind="pinned_host")


def step(work, k, v, summaries, flush, between=lambda tick: tick):
    tick = between(ffi.submit(work, k, v, summaries, scale=0.2))
    return ffi.collect(
        tick, work, k, v, summaries, flush, (tick.slot,), scale=0.2, return_selection=True
    )


def flushing_case() -> cases.Case:
    return cases.random_case(SHAPE).with_flush(first_block=(70, 40), num_blocks=(1, 2))


def host_cache(case: cases.Case) -> tuple[jax.Array, ...]:
    return tuple(jax.device_put(jnp.array(x), HOST) for x in (case.k, case.v, case.summaries))


@pytest.mark.parametrize("pinned_results", [False, True])
def test_a_while_loop_over_steps_is_in_place(pinned_results):
    case = flushing_case()
    cache = host_cache(case)
    work, flush = jax.tree.map(jnp.asarray, (case.work, case.flush))

    def body(state):
        index, cache, status = state
        done = step(work, *cache, flush)
        return index + 1, (done.k, done.v, done.summaries), status | done.status

    def loop(cache, steps):
        state = (0, cache, jnp.zeros(1, jnp.int32))
        return jax.lax.while_loop(lambda s: (s[0] < steps) & (s[2][0] == 0), body, state)

    out_shardings = (None, (PINNED,) * 3, None) if pinned_results else None
    compiled = (
        jax.jit(loop, donate_argnums=0, out_shardings=out_shardings).lower(cache, 3).compile()
    )
    assert full_size_copies(compiled.as_text(), [case.k.shape, case.summaries.shape]) == []
    before = pointers(cache)
    steps, after, status = compiled(cache, 3)
    assert (steps, status) == (3, STATUS_OK)
    assert pointers(after) == before
    assert {x.sharding.memory_kind for x in after} == {"pinned_host"}


def test_a_program_that_does_not_donate_leaves_its_cache_alone():
    case = flushing_case()
    cache = host_cache(case)
    done = jax.jit(step)(case.work, *cache, case.flush)
    assert done.status == STATUS_OK
    want = cases.reference(case)
    np.testing.assert_array_equal(done.k, want.k)
    for old, array in zip(cache, (case.k, case.v, case.summaries), strict=True):
        np.testing.assert_array_equal(old, array)


def test_a_cache_copied_between_submit_and_collect_is_noticed_and_not_written():
    case = flushing_case()
    cache = host_cache(case)
    # Outside of a program every call is one of its own, and collect gets a copy.
    done = step(case.work, *cache, case.flush)
    assert done.status == STATUS_NOT_IN_PLACE
    assert np.isneginf(done.lse).all()
    assert not np.any(done.out)
    for new, old in zip((done.k, done.v, done.summaries), cache, strict=True):
        np.testing.assert_array_equal(new, old)


def test_times_are_those_of_the_host_whatever_the_program_does_before_it_collects():
    case = cases.random_case(cases.Shape(num_blocks=400)).with_work(
        boundary=np.full((2, 3), 400), k_units=np.full((2, 12), 40)
    )
    case = case.with_flush(first_block=(0, 0), num_blocks=(0, 0))

    def wait(slot):
        time.sleep(0.3)
        return slot

    def between(tick):
        slot = jax.ShapeDtypeStruct((2,), jnp.int32)
        return tick._replace(slot=jax.pure_callback(wait, slot, tick.slot))

    program = jax.jit(lambda *args: step(*args, between=between), donate_argnums=(1, 2, 3))
    threads = native.info()["threads"]
    native.set_threads(max(2, threads))
    try:
        done = program(case.work, *host_cache(case), case.flush)
        seconds = dict(zip(TIMES, np.asarray(done.times), strict=True))
    finally:
        native.set_threads(threads)
    assert done.status == STATUS_OK
    stages_s = [seconds[name] for name in ("scored", "selected", "attended")]
    assert min(seconds["selected"], seconds["attended"]) > 0
    assert sum(stages_s) <= seconds["busy"] * (1 + 1e-5)
    assert 0 < seconds["covered"] <= seconds["span"] * (1 + 1e-5)
    assert seconds["covered"] <= seconds["busy"] * (1 + 1e-5)
    assert 0 < seconds["span"] < 0.3
    # Scores are there before the end, and took at least what each thread did of them.
    assert seconds["scored"] / max(2, threads) <= seconds["scoring"] * (1 + 1e-5)
    assert seconds["scored"] > 0
    assert seconds["scoring"] < seconds["span"]
    assert seconds["waited"] < 0.1
    assert 0 < seconds["own"] < 0.1


@pytest.mark.parametrize("threads", [1, 3])
def test_submit_and_collect_may_be_in_programs_of_their_own(threads):
    # What the first has computed may lie where the next one puts something else.
    case = cases.random_case(cases.Shape(num_blocks=400)).with_work(
        boundary=np.full((2, 3), 400), k_units=np.full((2, 12), 40)
    )
    case = case.with_flush(first_block=(0, 0), num_blocks=(0, 0))
    half = case.work._replace(q=case.work.q * np.float32(0.5))

    def first(half, *cache):
        return ffi.submit(half._replace(q=2.0 * half.q), *cache, scale=0.2)

    def second(tick, half, *cache):
        work = half._replace(q=2.0 * half.q)
        return ffi.collect(tick, work, *cache, case.flush, (), scale=0.2, return_selection=False)

    submit, collect = jax.jit(first), jax.jit(second, donate_argnums=(2, 3, 4))
    want = jax.jit(step, donate_argnums=(1, 2, 3))(case.work, *host_cache(case), case.flush)
    before = native.info()["threads"]
    native.set_threads(threads)
    try:
        for _ in range(10):
            cache = host_cache(case)
            tick = jax.block_until_ready(submit(half, *cache))
            done = collect(tick, half, *cache)
            assert done.status == STATUS_OK
            np.testing.assert_array_equal(done.out, want.out)
    finally:
        native.set_threads(before)


def test_memory_of_queries_is_not_another_values_while_they_are_read():
    # They are not copied. What a program computes meanwhile may be put where they were.
    case = cases.random_case(cases.Shape(num_blocks=400)).with_work(
        boundary=np.full((2, 3), 400), k_units=np.full((2, 12), 40)
    )
    case = case.with_flush(first_block=(0, 0), num_blocks=(0, 0))
    half = case.work._replace(q=case.work.q * np.float32(0.5))

    def program(half, others, *cache):
        work = half._replace(q=2.0 * half.q, q8=half.q8 + np.int8(0))
        tick = ffi.submit(work, *cache, scale=0.2)
        rest = [jnp.cumsum(x + i, axis=-1) for x in others for i in range(8)]
        done = ffi.collect(tick, half, *cache, case.flush, (), scale=0.2, return_selection=False)
        return done, rest

    want = jax.jit(step, donate_argnums=(1, 2, 3))(case.work, *host_cache(case), case.flush)
    compiled = jax.jit(program, donate_argnums=(2, 3, 4))
    threads = native.info()["threads"]
    native.set_threads(3)
    try:
        for _ in range(20):
            done, _ = compiled(half, (half.q, half.q8), *host_cache(case))
            assert done.status == STATUS_OK
            np.testing.assert_array_equal(done.out, want.out)
    finally:
        native.set_threads(threads)


def test_one_thread_is_enough():
    threads = native.info()["threads"]
    native.set_threads(1)
    try:
        cases.check("native", flushing_case())
    finally:
        native.set_threads(threads)


def test_threads_with_their_own_caches_do_not_meet():
    failures = []

    def program(seed: int) -> None:
        try:
            case = cases.random_case(SHAPE, seed=seed)
            want = cases.reference(case)
            for _ in range(10):
                got = cases.run("native", case)
                np.testing.assert_array_equal(got.selection, want.selection)
                np.testing.assert_allclose(got.out, want.out, atol=1e-5)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=program, args=(seed,)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []


FAILING_PROGRAM = """
import jax, jax.numpy as jnp
from host_ops import HOST, ffi, native
from host_ops.types import Flush, Work

native.set_threads(2)
kv, p, h = 2, 2048, 128
zeros = lambda *shape: jnp.zeros(shape, jnp.int32)
work = Work(jnp.ones((1, kv, h)), jnp.zeros((1, kv, h), jnp.int8), zeros(1, kv) + 16, zeros(1, kv),
            zeros(1, kv), zeros(1) + p, zeros(1, kv) + p, zeros(1),
            jnp.full((1, kv, p // 32), 0xFFFFFFFF, jnp.uint32))
block = jnp.zeros((1, kv, 1, 16, h))
flush = Flush(block, block, jnp.zeros((1, kv, 1, 2, h), jnp.int8), zeros(1, kv, h), zeros(1),
              zeros(1))

def fail(slot):
    raise RuntimeError("on purpose")

def step(k, v):
    tick = ffi.submit(work, k, v, None, scale=1.0)
    slot = jax.pure_callback(fail, jax.ShapeDtypeStruct((2,), jnp.int32), tick.slot)
    tick = tick._replace(slot=slot)
    return ffi.collect(tick, work, k, v, None, flush, (), scale=1.0, return_selection=False)

program = jax.jit(step, donate_argnums=(0, 1))
for _ in range(3):
    k = jax.device_put(jnp.ones((1, kv, p, 16, h)), HOST)
    v = jax.device_put(jnp.ones((1, kv, p, 16, h)), HOST)
    try:
        jax.block_until_ready(program(k, v))
    except Exception as error:
        assert "on purpose" in str(error)
        print("failed as it should")
print("given up", native.drain(), native.info()["in_flight"])
"""


def test_memory_of_a_program_that_fails_between_submit_and_collect_outlives_the_work():
    # Large arrays are unmapped when freed, so a thread that still reads them ends the process.
    done = subprocess.run(
        [sys.executable, "-c", FAILING_PROGRAM],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["failed as it should"] * 3 + ["given up 3 0"]


def test_a_slot_alone_is_no_tick_of_a_submit_that_has_named_the_results_memory():
    case = cases.random_case(SHAPE)

    def program(work, k, v, summaries, flush):
        tick = ffi.submit(work, k, v, summaries, scale=0.2)
        return ffi.collect(
            Tick(tick.slot), work, k, v, summaries, flush, (), scale=0.2, return_selection=False
        )

    done = jax.jit(program, donate_argnums=(1, 2, 3))(case.work, *host_cache(case), case.flush)
    assert done.status == STATUS_INVALID
    assert not np.any(done.out)
    assert np.isneginf(done.lse).all()


def test_a_tick_is_good_for_one_collect():
    case = flushing_case()

    def twice(work, k, v, summaries, flush):
        tick = ffi.submit(work, k, v, summaries, scale=0.2)
        statuses = []
        for _ in range(2):
            done = ffi.collect(
                tick, work, k, v, summaries, flush, (), scale=0.2, return_selection=False
            )
            k, v, summaries = done.k, done.v, done.summaries
            statuses.append(done.status)
        return k, v, summaries, statuses

    *_, statuses = jax.jit(twice, donate_argnums=(1, 2, 3))(
        case.work, *host_cache(case), case.flush
    )
    assert statuses == [STATUS_OK, STATUS_INVALID]


SLOW_PROGRAM = """
import jax, numpy as np
from tests.host_ops import cases
from tests.host_ops.test_native_programs import SHAPE, host_cache, step

case = cases.random_case(SHAPE).with_work(boundary=np.full((2, 3), 72))
done = jax.jit(step, donate_argnums=(1, 2, 3))(case.work, *host_cache(case), case.flush)
print(int(done.status[0]), bool(np.isneginf(done.lse).all()))
"""


def test_a_collect_that_takes_too_long_ends_with_a_status():
    # The variable is read once in a process.
    limits = {"FLUXION_TIMEOUT_S": "1e-9", "FLUXION_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SLOW_PROGRAM],
        env=os.environ | limits,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.stdout.split() == [str(STATUS_TIMEOUT), "True"], done.stderr


WRONG_PROGRAMS = """
import jax, numpy as np
from tests.host_ops import cases
from tests.host_ops.test_native_programs import flushing_case, host_cache, step

case = flushing_case()
work, flush, cache = case.work, case.flush, host_cache(case)
for wrong_work, wrong_flush in [
    (work._replace(q8=work.q8[:, :, :8]), flush),
    (work._replace(granularity=work.granularity[:, :2]), flush),
    (work._replace(k_units=work.k_units.astype(np.float32)), flush),
    (work._replace(bitmap=np.zeros((2, 12, 9), np.uint32)), flush),
    (work, flush._replace(v=flush.v[:, :, :3])),
    (work, flush._replace(shift=flush.shift[:1])),
]:
    try:
        jax.block_until_ready(jax.jit(step)(wrong_work, *cache, wrong_flush))
    except Exception as error:
        print(error)
"""


def test_a_wrong_shape_or_dtype_is_an_error_of_the_program():
    # In a process of its own, because JAX brings such an error up once more at exit.
    done = subprocess.run(
        [sys.executable, "-c", WRONG_PROGRAMS], capture_output=True, text=True, check=False
    )
    for line, said in zip(
        done.stdout.splitlines(),
        [
            "q8: expected int8 [2, 12, 40], got int8 [2, 12, 8]",
            "granularity: expected int32 [2, 3], got int32 [2, 2]",
            "k_units: expected int32 [2, 12], got float32 [2, 12]",
            "bitmap: expected uint32 [2, 12, 3], got uint32 [2, 12, 9]",
            "flush.v: expected float32 [2, 3, 7, 16, 40], got float32 [2, 3, 3, 16, 40]",
            "flush.shift: expected int32 [2, 3, 40], got int32 [1, 3, 40]",
        ],
        strict=True,
    ):
        assert said in line
