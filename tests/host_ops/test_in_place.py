"""The cache stays where it is: same buffers, same memory kind, no copy of its size."""

from __future__ import annotations

import jax
import pytest

import host_ops
from tests.hlo import full_size_copies
from tests.host_ops import cases

SHAPE = cases.Shape(num_blocks=72)


def pointers(cache) -> list[int]:
    return [x.unsafe_buffer_pointer() for x in cache]


def test_the_audit_sees_a_copy():
    def copying(x):
        return x.at[0].set(1.0), x.sum(), x + 0.5

    hlo = jax.jit(copying).lower(jax.numpy.zeros((7, 9))).compile().as_text()
    assert full_size_copies(hlo, [(7, 9)])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("bitmap", [False, True])
def test_a_step_is_in_place(implementation, dtype, bitmap):
    shape = cases.Shape(dtype=dtype, num_blocks=72)
    case = cases.random_case(shape, bitmap=bitmap)
    case = case.with_flush(first_block=(70, 40), num_blocks=(1, 2))
    cache = [cases.to_host(x) for x in (case.k, case.v, case.summaries)]

    def step(work, k, v, summaries, flush):
        tick = host_ops.submit(work, k, v, summaries, scale=1.0, implementation=implementation)
        # The device's share reads the cache before the flush, as it does in a decode step.
        device_k = host_ops.retag(k, host_ops.DEVICE)
        read = jax.lax.dynamic_slice(device_k, (0, 0, tick.slot[0] + 5, 0, 0), (1, 1, 1, 16, 40))
        return host_ops.collect(
            tick,
            work,
            k,
            v,
            summaries,
            flush,
            (read.astype("float32").sum(),),
            scale=1.0,
            implementation=implementation,
        )

    compiled = (
        jax.jit(step, donate_argnums=(1, 2, 3)).lower(case.work, *cache, case.flush).compile()
    )
    sizes = [case.k.shape, case.summaries.shape]
    assert full_size_copies(compiled.as_text(), sizes) == []
    before = pointers(cache)
    result = compiled(case.work, *cache, case.flush)
    assert pointers((result.k, result.v, result.summaries)) == before
    assert {x.sharding.memory_kind for x in (result.k, result.v, result.summaries)} == {
        "pinned_host"
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_append_is_in_place(implementation, dtype):
    shape = cases.Shape(dtype=dtype, num_blocks=72)
    case = cases.random_case(shape).with_flush(first_block=(3, 40), num_blocks=(7, 2))
    cache = [cases.to_host(x) for x in (case.k, case.v, case.summaries)]
    compiled = cases.jitted_append(implementation).lower(*cache, case.flush).compile()
    assert full_size_copies(compiled.as_text(), [case.k.shape, case.summaries.shape]) == []
    before = pointers(cache)
    *after, _ = compiled(*cache, case.flush)
    assert pointers(after) == before


def test_a_loop_over_steps_is_in_place(implementation):
    case = cases.random_case(SHAPE).with_flush(first_block=(70, 40), num_blocks=(1, 2))
    cache = tuple(cases.to_host(x) for x in (case.k, case.v, case.summaries))
    work, flush = jax.tree.map(jax.numpy.asarray, (case.work, case.flush))

    def step(cache, _):
        tick = host_ops.submit(work, *cache, scale=1.0, implementation=implementation)
        result = host_ops.collect(
            tick,
            work,
            *cache,
            flush,
            (),
            scale=1.0,
            implementation=implementation,
        )
        return (result.k, result.v, result.summaries), result.lse

    loop = jax.jit(lambda cache: jax.lax.scan(step, cache, length=3), donate_argnums=0)
    compiled = loop.lower(cache).compile()
    assert full_size_copies(compiled.as_text(), [case.k.shape, case.summaries.shape]) == []
    before = pointers(cache)
    after, lse = compiled(cache)
    assert pointers(after) == before
    assert lse.shape == (3, 2, 12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_append_after_a_read_is_in_place(implementation, dtype):
    shape = cases.Shape(dtype=dtype, num_blocks=72)
    case = cases.random_case(shape).with_flush(first_block=(3, 40), num_blocks=(7, 2))
    cache = [cases.to_host(x) for x in (case.k, case.v, case.summaries)]

    def step(k, v, summaries, flush, at):
        device_k = host_ops.retag(k, host_ops.DEVICE)
        block = jax.lax.dynamic_slice(device_k, (0, 0, at, 0, 0), (1, 1, 1, 16, 40))
        read = block.astype("float32").sum()
        written = host_ops.append(k, v, summaries, flush, (read,), implementation=implementation)
        return written, read

    compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*cache, case.flush, 3).compile()
    assert full_size_copies(compiled.as_text(), [case.k.shape, case.summaries.shape]) == []
    before = pointers(cache)
    (*after, _), read = compiled(*cache, case.flush, 3)
    assert pointers(after) == before
    want = case.k[0, 0, 3].astype("float64").sum()
    assert abs(float(read) - want) < 1e-3
