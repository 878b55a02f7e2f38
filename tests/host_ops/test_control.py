"""Cancel words and injected faults."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import host_ops
from host_ops import native
from tests.host_ops import cases

NODES = len(list(Path("/sys/devices/system/node").glob("node[0-9]*/meminfo"))) or 1
SHAPE = cases.Shape(num_blocks=72)
IMPLEMENTATIONS = [pytest.param("native", marks=pytest.mark.native), "numpy"]


def case_with_work(word: int = 0) -> cases.Case:
    case = cases.random_case(SHAPE).with_work(boundary=np.full((2, 3), 72), cancel=[word])
    return case.with_flush(first_block=(64, 64), num_blocks=(1, 1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_cancelled_step_reports_it_and_writes_nothing(implementation):
    word = host_ops.new_cancel_word()
    try:
        assert cases.run(implementation, case_with_work(word)).status == [host_ops.STATUS_OK]
        host_ops.cancel(word)
        case = case_with_work(word)
        got = cases.run(implementation, case)
        assert got.status == [host_ops.STATUS_CANCELLED]
        np.testing.assert_array_equal(got.k, case.k)
        other = cases.run(implementation, case_with_work())
        assert other.status == [host_ops.STATUS_OK]
    finally:
        host_ops.release_cancel_word(word)


def test_a_released_word_cannot_be_cancelled():
    word = host_ops.new_cancel_word()
    host_ops.release_cancel_word(word)
    with pytest.raises(ValueError, match=f"live cancel word, got {word}"):
        host_ops.cancel(word)


def test_words_are_never_zero():
    words = [host_ops.new_cancel_word() for _ in range(3)]
    assert len({0, *words}) == 4
    for word in words:
        host_ops.release_cancel_word(word)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_injected_fault_comes_once_and_after_the_collects_it_was_told_to_wait_for(
    implementation,
):
    host_ops.inject_fault(host_ops.STATUS_INTERNAL, after_calls=2, implementation=implementation)
    try:
        status = [int(cases.run(implementation, case_with_work()).status[0]) for _ in range(4)]
    finally:
        host_ops.inject_fault(host_ops.STATUS_OK, implementation=implementation)
    assert status == [0, 0, host_ops.STATUS_INTERNAL, 0]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_fault_in_append_comes_once_and_nothing_is_written(implementation):
    case = case_with_work()
    program = cases.jitted_append(implementation)

    def append():
        k, *_, status = program(*map(cases.to_host, (case.k, case.v, case.summaries)), case.flush)
        return int(status[0]), np.array_equal(k, case.k)

    host_ops.inject_fault(
        host_ops.STATUS_INTERNAL, 1, operation="append", implementation=implementation
    )
    try:
        assert cases.run(implementation, case).status == [host_ops.STATUS_OK]
        assert [append() for _ in range(3)] == [
            (host_ops.STATUS_OK, False),
            (host_ops.STATUS_INTERNAL, True),
            (host_ops.STATUS_OK, False),
        ]
    finally:
        host_ops.inject_fault(host_ops.STATUS_OK, operation="append", implementation=implementation)


def test_a_submit_cannot_be_made_to_fail():
    with pytest.raises(ValueError, match=r"one of .'append', 'collect'., got 'submit'"):
        host_ops.inject_fault(host_ops.STATUS_INTERNAL, operation="submit")


@pytest.mark.native
def test_spreading_an_array_over_memory_nodes_keeps_what_it_holds():
    x = cases.to_host(np.arange(1 << 20, dtype=np.float32))
    host_ops.spread(x)
    np.testing.assert_array_equal(x, np.arange(1 << 20))
    assert native.spread(x.unsafe_buffer_pointer(), x.nbytes) == NODES


def test_draining_with_nothing_to_do_returns():
    host_ops.drain()


def test_the_xla_tier_cannot_be_made_to_fail():
    with pytest.raises(host_ops.UnavailableError, match="got 'xla'; build the native library"):
        host_ops.inject_fault(host_ops.STATUS_INTERNAL, implementation="xla")
