"""The native operations on a CUDA stream: right, in place, ahead of the data, in any mode."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

import host_ops
from host_ops import Collected, native
from host_ops.types import STATUS_CANCELLED, STATUS_INVALID, STATUS_OK
from tests.host_ops import cases
from tests.host_ops.test_in_place import full_size_copies, pointers

pytestmark = [pytest.mark.gpu, pytest.mark.native]

SHAPE = cases.Shape(num_blocks=72)
# 4096 tokens of a layer of 8 KV heads with 4 query heads each.
LAYER = cases.Shape(
    num_blocks=256, head_dim=128, batch=1, kv_heads=8, dtype="bfloat16", flush_blocks=1
)
LAYER_S = 35e-6
RUNS = 50


def shardings() -> tuple[SingleDeviceSharding, SingleDeviceSharding]:
    """Device memory and pinned host memory."""
    device = jax.devices()[0]
    return SingleDeviceSharding(device), SingleDeviceSharding(device, memory_kind="pinned_host")


def host_cache(case: cases.Case) -> tuple[Any, ...]:
    return tuple(map(cases.to_host, (case.k, case.v, case.summaries)))


def step(work: Any, cache: Any, flush: Any) -> Collected:
    tick = host_ops.submit(work, *cache, scale=0.2, implementation="native")
    device_lse = jnp.where(tick.slot[0] >= 0, work.q[..., 0], -jnp.inf)
    return host_ops.collect(
        tick,
        work,
        *cache,
        flush,
        (device_lse,),
        scale=0.2,
        return_selection=True,
        implementation="native",
    )


def jitted_step() -> Any:
    device, pinned = shardings()
    places = Collected(pinned, pinned, pinned, *[device] * 7)
    return jax.jit(step, donate_argnums=1, out_shardings=places)


def check(case: cases.Case) -> None:
    got = jax.tree.map(np.asarray, jitted_step()(case.work, host_cache(case), case.flush))
    want = cases.reference(case)
    for name in ("status", "selection", "blocks_read", "units_scanned"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
    for name in ("lse", "out"):
        np.testing.assert_allclose(
            getattr(got, name),
            getattr(want, name),
            cases.TOLERANCE,
            cases.TOLERANCE,
            err_msg=name,
        )
    cases.check_cache((got.k, got.v, got.summaries), (want.k, want.v, want.summaries), case.flush)


def flushing_case(shape: cases.Shape = SHAPE, **options: Any) -> cases.Case:
    case = cases.random_case(shape, **options).with_flush(first_block=(70, 40), num_blocks=(1, 2))
    return cases.dataclasses.replace(case, scale=0.2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("bitmap", [False, True])
def test_a_step_equals_the_reference(dtype, bitmap):
    check(flushing_case(cases.Shape(num_blocks=72, dtype=dtype), bitmap=bitmap))


@pytest.mark.parametrize(
    ("variable", "value", "mode"),
    [
        ("FLUXION_CUDA_SYNC", "memops", "memops"),
        ("FLUXION_CUDA_SYNC", "hostfunc", "hostfunc"),
        ("CUDA_LAUNCH_BLOCKING", "1", "hostfunc"),
        ("FLUXION_NUM_THREADS", "1", "kernels"),
    ],
)
def test_a_step_equals_the_reference_in_other_modes(variable, value, mode):
    script = (
        "from tests.host_ops import test_gpu as t; t.check(t.flushing_case()); "
        "t.test_many_steps_of_several_layers_run_ahead_of_their_data(); "
        "print(t.native.info()['cuda'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        # Two processes have to share the memory of the device.
        env=os.environ | {variable: value, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().split(",")[0] == mode


def test_small_arrays_are_copied_by_our_kernel():
    check(flushing_case())
    if os.environ.get("FLUXION_CUDA_SYNC", "kernel") == "kernel":
        assert native.info()["cuda"] == "kernels"


@pytest.mark.parametrize("num_blocks", [(0, 0), (0, 1), (2, 0), (2, 2)])
def test_only_rows_that_write_blocks_bring_them(num_blocks):
    """A row's slot in pinned memory still holds what an earlier step wrote there."""
    for seed, now in ((1, (2, 2)), (2, num_blocks)):
        case = cases.random_case(SHAPE, seed=seed).with_flush(first_block=(60, 40), num_blocks=now)
        check(cases.dataclasses.replace(case, scale=0.2))


def test_large_flushes_of_few_rows():
    """More than the driver's copy would take, of which the kernel takes one row."""
    shape = cases.Shape(
        num_blocks=72, batch=16, kv_heads=8, head_dim=128, dtype="bfloat16", flush_blocks=1
    )
    case = cases.random_case(shape).with_flush(
        first_block=np.full(16, 60), num_blocks=np.arange(16) == 5
    )
    check(cases.dataclasses.replace(case, scale=0.2))


def test_append_equals_the_reference():
    case = flushing_case()
    device, pinned = shardings()
    program = jax.jit(
        host_ops.append, donate_argnums=(0, 1, 2), out_shardings=(pinned, pinned, pinned, device)
    )
    *got, status = program(*host_cache(case), case.flush)
    want = cases.reference(case)
    assert status == STATUS_OK
    cases.check_cache([np.asarray(x) for x in got], (want.k, want.v, want.summaries), case.flush)


def test_many_steps_of_several_layers_run_ahead_of_their_data():
    """Every other step writes a block that the next ones read, so none may be early or late.

    What the other steps bring to be written is never to be seen.
    """
    layers, blocks = 4, 64
    shape = cases.Shape(num_blocks=72, batch=1, dtype="float32", flush_blocks=1)
    case = cases.random_case(shape).with_work(
        boundary=np.full((1, 3), 72), k_units=np.full((1, 12), 72), granularity=np.full((1, 3), 16)
    )
    device, pinned = shardings()
    flush = case.flush._replace(num_blocks=np.ones(1, np.int32))

    def one(step_index: Any, state: Any) -> Any:
        caches, keys, status = state
        index, writes = (step_index + 1) // 2, step_index % 2 == 0
        work = case.work._replace(host_blocks=jnp.full((1,), index, jnp.int32))
        after = []
        for cache in caches:
            block = jnp.where(writes, keys, 1e9) * jnp.ones_like(flush.v)
            now = flush._replace(
                v=block,
                first_block=jnp.full((1,), index, jnp.int32),
                num_blocks=writes.astype(jnp.int32)[None],
            )
            done = step(work, cache, now)
            # The mean of what was written so far, one more than that is written next.
            new = jnp.where(index > 0, 2 * done.out[0, 0, 0] + 1, 0.0)
            keys = jnp.where(writes, new, keys)
            status = status | done.status
            after.append((done.k, done.v, done.summaries))
        return after, keys, status

    def run(caches: Any) -> Any:
        # Equal keys, so that attention is the mean of the values: 0, 1, 2 and so on.
        state = (caches, jnp.zeros(()), jnp.zeros(1, jnp.int32))
        return jax.lax.fori_loop(0, 2 * blocks, one, state)

    zeros = cases.dataclasses.replace(case, k=np.zeros_like(case.k), v=np.zeros_like(case.v))
    flush = flush._replace(k=np.zeros_like(flush.k))
    want = np.zeros((blocks, layers))
    keys = 0.0
    for index in range(blocks):
        for layer in range(layers):
            want[index, layer] = keys
            keys = 2 * want[:index, layer].mean() + 1 if index > 0 else 0.0
    caches = [host_cache(zeros) for _ in range(layers)]
    places = ([(pinned,) * 3] * layers, device, device)
    compiled = jax.jit(run, donate_argnums=0, out_shardings=places).lower(caches).compile()
    assert full_size_copies(compiled.as_text(), [case.k.shape, case.summaries.shape]) == []
    # Were a fence missing somewhere, few runs would show it.
    for _ in range(RUNS):
        caches = [host_cache(zeros) for _ in range(layers)]
        before = [pointers(cache) for cache in caches]
        caches, _, status = compiled(caches)
        assert status == STATUS_OK
        assert [pointers(cache) for cache in caches] == before
        # What one layer hands to the next is known before the next writes it.
        written = [np.asarray(cache[1])[0, 0, :blocks, 0, 0] for cache in caches]
        np.testing.assert_allclose(np.stack(written, 1), want, rtol=1e-3)


def test_threads_with_their_own_caches_do_not_meet():
    failures = []

    def program(seed: int) -> None:
        try:
            for _ in range(10):
                check(cases.dataclasses.replace(cases.random_case(SHAPE, seed=seed), scale=0.2))
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=program, args=(seed,)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []


def test_a_cancelled_step_says_so_and_the_next_one_works():
    case = flushing_case()
    word = native.new_cancel_word()
    native.cancel(word)
    cancelled = case.with_work(cancel=[word])
    done = jax.block_until_ready(jitted_step()(cancelled.work, host_cache(case), case.flush))
    native.release_cancel_word(word)
    assert done.status == STATUS_CANCELLED
    np.testing.assert_array_equal(done.k, case.k)
    assert np.isneginf(np.asarray(done.lse)).all()
    done = jitted_step()(cancelled.work, host_cache(case), case.flush)
    assert done.status == STATUS_INVALID
    check(case)
    assert native.info()["in_flight"] == 0


def test_a_cache_in_device_memory_is_refused_with_the_remedy():
    case = flushing_case()
    cache = [jnp.asarray(x) for x in (case.k, case.v, case.summaries)]

    def submit(work: Any, k: Any, v: Any, summaries: Any) -> Any:
        tagged = (host_ops.retag(x, host_ops.HOST) for x in (k, v, summaries))
        return host_ops.submit(work, *tagged, scale=1.0, implementation="native")

    with pytest.raises(Exception, match="expected a cache in pinned host memory"):
        jax.block_until_ready(jax.jit(submit)(case.work, *cache))
    check(case)


def layers_s(layers: int, runs: int) -> float:
    """The least wall time of a program of this many round trips without work, one after another."""
    case = cases.random_case(LAYER).with_work(boundary=np.zeros((1, 8)), host_blocks=[256])
    device, pinned = shardings()
    work, flush = jax.device_put((case.work, case.flush), device)

    def chain(cache: Any, work: Any, flush: Any) -> Any:
        q, status = work.q, jnp.zeros(1, jnp.int32)
        for _ in range(layers):
            now = work._replace(q=q)
            tick = host_ops.submit(now, *cache, scale=0.1, implementation="native")
            done = host_ops.collect(
                tick, now, *cache, flush, (), scale=0.1, implementation="native"
            )
            cache = (done.k, done.v, done.summaries)
            q, status = q + done.out, status | done.status
        return cache, q, status

    places = ((pinned,) * 3, device, device)
    program = jax.jit(chain, donate_argnums=0, out_shardings=places)
    cache = host_cache(case)
    taken_s = []
    for _ in range(runs):
        start_s = time.perf_counter()
        cache, _, status = jax.block_until_ready(program(cache, work, flush))
        taken_s.append(time.perf_counter() - start_s)
        assert status == STATUS_OK
    return min(taken_s)


def round_trip_s() -> float:
    return (layers_s(96, 100) - layers_s(32, 100)) / 64


def test_a_round_trip_without_work_is_short():
    took_s = round_trip_s()
    print(f"{native.info()['cuda']}: {1e6 * took_s:.1f} us a layer")
    assert took_s < LAYER_S
