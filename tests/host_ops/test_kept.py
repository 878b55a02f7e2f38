"""The calls as they are made for a GPU, where the cache is not among their results, on the CPU."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import host_ops
from host_ops import compat
from host_ops.types import STATUS_NOT_IN_PLACE, STATUS_OK
from tests.host_ops import cases, test_equivalence_append, test_in_place

pytestmark = pytest.mark.native


@pytest.fixture(autouse=True)
def traced_for_gpu(monkeypatch):
    programs = (cases.jitted_step, cases.jitted_append)
    monkeypatch.setattr(compat, "traced_for_gpu", lambda: True)
    for program in programs:
        program.cache_clear()
    yield
    for program in programs:
        program.cache_clear()


@pytest.mark.parametrize("bitmap", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_step_equals_the_reference_in_place(bitmap, dtype):
    case = cases.random_case(cases.Shape(num_blocks=72, dtype=dtype), bitmap=bitmap)
    cases.check("native", case.with_flush(first_block=(70, 40), num_blocks=(1, 2)))
    test_in_place.test_a_step_is_in_place("native", dtype, bitmap)


def test_append_equals_the_reference_in_place():
    test_equivalence_append.test_append("native", (70, 40), (1, 2))
    test_in_place.test_append_is_in_place("native", "bfloat16")
    test_in_place.test_append_after_a_read_is_in_place("native", "float32")


def test_a_loop_is_in_place():
    test_in_place.test_a_loop_over_steps_is_in_place("native")


def test_no_result_but_the_cache_aliases_an_operand():
    case = cases.random_case(cases.Shape(num_blocks=72))
    cache = [cases.to_host(x) for x in (case.k, case.v, case.summaries)]

    def step(work, k, v, summaries, flush):
        tick = host_ops.submit(work, k, v, summaries, scale=1.0, implementation="native")
        return host_ops.collect(
            tick, work, k, v, summaries, flush, (), scale=1.0, implementation="native"
        )

    text = jax.jit(step, donate_argnums=(1, 2, 3)).lower(case.work, *cache, case.flush).as_text()
    calls = [line for line in text.splitlines() if "custom_call @fluxion" in line]
    aliasing = [line for line in calls if "output_operand_alias" in line]
    assert sum("@fluxion_collect" in line for line in calls) == 1
    assert len(aliasing) == 6
    assert all("@fluxion_keep" in line for line in aliasing)


def test_a_cache_that_was_not_donated_is_left_alone():
    case = cases.random_case(cases.Shape(num_blocks=72))
    case = case.with_flush(first_block=(70, 40), num_blocks=(1, 2))
    cache = [cases.to_host(x) for x in (case.k, case.v, case.summaries)]

    def step(work, k, v, summaries, flush):
        tick = host_ops.submit(work, k, v, summaries, scale=1.0, implementation="native")
        return host_ops.collect(
            tick, work, k, v, summaries, flush, (), scale=1.0, implementation="native"
        )

    done = jax.jit(step)(case.work, *cache, case.flush)
    # Copied before submit all is well with the copy; copied after it, collect says so.
    assert int(done.status[0]) in (STATUS_OK, STATUS_NOT_IN_PLACE)
    assert done.k.unsafe_buffer_pointer() != cache[0].unsafe_buffer_pointer()
    for array, before in zip(cache, (case.k, case.v, case.summaries), strict=True):
        np.testing.assert_array_equal(np.asarray(array), before)
