"""Choice of an implementation: used or refused by name, never replaced in silence."""

from __future__ import annotations

import jax
import pytest

from pallas_kernels.registry import UnsupportedImplementationError, dispatch


def refuse(reason):
    def implementation(value):
        raise UnsupportedImplementationError(reason)

    return implementation


CANDIDATES = {"mosaic": refuse("no GPU"), "triton": refuse("too old"), "xla": lambda x: x + 1}


def test_none_works_here():
    assert dispatch("op", None, CANDIDATES, 1) == 2


def test_a_name_is_used():
    assert dispatch("op", "xla", CANDIDATES, 1) == 2


def test_a_name_that_does_not_work_raises_its_reason():
    with pytest.raises(
        NotImplementedError, match=r"got 'mosaic', of which none does.*mosaic: no GPU"
    ):
        dispatch("op", "mosaic", CANDIDATES, 1)


def test_a_sequence_is_tried_in_order():
    assert dispatch("op", ("mosaic", "xla"), CANDIDATES, 1) == 2
    both = {"a": lambda: 1, "b": lambda: 2}
    assert dispatch("op", ("b", "a"), both) == 2


def test_a_sequence_that_fails_lists_every_reason():
    with pytest.raises(UnsupportedImplementationError, match="mosaic: no GPU; triton: too old"):
        dispatch("op", ["mosaic", "triton"], CANDIDATES, 1)


@pytest.mark.parametrize("wrong", ["cuda", (), ("xla", "cuda")])
def test_unknown_names_are_refused(wrong):
    with pytest.raises(
        ValueError, match=r"expected implementation of op to be None or out of \['mosaic'"
    ):
        dispatch("op", wrong, CANDIDATES, 1)


def test_other_errors_are_not_swallowed():
    def broken(value):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        dispatch("op", ("broken", "xla"), {"broken": broken, "xla": lambda x: x}, 1)


def test_a_kernel_is_traced_once_for_all_layers():
    traced = []

    def kernel(x, *, factor):
        traced.append(x)
        return factor * x

    def model(x):
        for _ in range(3):
            x = dispatch("op", "triton", {"triton": kernel}, x, factor=2.0)
        return dispatch("op", "triton", {"triton": kernel}, x, factor=3.0)

    assert jax.jit(model)(1.0) == 24.0
    assert len(traced) == 2
