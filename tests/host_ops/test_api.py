"""Choosing an implementation, and the errors for what does not fit."""

from __future__ import annotations

import warnings

import jax
import numpy as np
import pytest

import host_ops
from host_ops import api
from tests.host_ops import cases

SHAPE = cases.Shape(num_blocks=8, batch=1)


@pytest.fixture
def unavailable(monkeypatch):
    """Makes implementations unavailable: a dict from name to reason."""
    reasons: dict[str, str] = {}
    monkeypatch.setattr(api, "_unavailable_reason", lambda name: reasons.get(name))
    api._warn_fallback.cache_clear()
    yield reasons
    api._warn_fallback.cache_clear()


def submit(implementation, case=None):
    case = case or cases.random_case(SHAPE)
    return jax.eval_shape(
        lambda work, k, v, s: host_ops.submit(
            work, k, v, s, scale=1.0, implementation=implementation
        ),
        case.work,
        case.k,
        case.v,
        case.summaries,
    )


def test_available_gives_a_reason_or_none():
    found = host_ops.available()
    assert list(found) == ["native", "xla", "numpy"]
    assert all(reason is None or len(reason) > 10 for reason in found.values())
    if jax.default_backend() == "cpu":
        assert found["xla"] is found["numpy"] is None


def test_the_default_falls_back_with_one_warning(unavailable):
    unavailable["native"] = "it was not built"
    with pytest.warns(RuntimeWarning, match=r"'xla'.*it was not built.*CMake") as record:
        [submit(None) for _ in range(2)]
    assert len(record) == 1


def test_a_chosen_fallback_is_silent(unavailable):
    unavailable["native"] = "it was not built"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        submit("xla")
        submit(("native", "numpy"))


def test_a_name_is_used_or_raises(unavailable):
    unavailable["numpy"] = "no buffers here"
    with pytest.raises(host_ops.UnavailableError, match="numpy: no buffers here"):
        submit("numpy")
    with pytest.raises(NotImplementedError):
        submit("numpy")


def test_if_all_fail_every_reason_is_listed(unavailable):
    unavailable.update(native="not built", xla="no host memory")
    with pytest.raises(host_ops.UnavailableError, match="native: not built; xla: no host memory"):
        submit(None)
    with pytest.raises(host_ops.UnavailableError, match="xla: no host memory; native: not built"):
        submit(["xla", "native"])


@pytest.mark.parametrize("implementation", ["cuda", (), ("xla", "torch")])
def test_unknown_names(implementation):
    with pytest.raises(ValueError, match=r"expected None, one of .*'xla'.* got"):
        submit(implementation)


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "message"),
    [
        ("k", (1, 3, 9, 16, 40), "float32", r"k: expected shape \[B, K, P, 16, H\].*got \(1, 3, 9"),
        ("k", (1, 3, 8, 32, 40), "float32", r"k: expected shape .* 16, H\]"),
        ("k", (1, 3, 8, 16, 36), "float32", "head size that is a multiple of 8 up to 256, got 36"),
        ("k", (1, 3, 8, 16, 264), "float32", "multiple of 8 up to 256, got 264"),
        ("k", (1, 3, 8, 16, 40), "int8", "dtype bfloat16, float16 or float32, got int8; cast"),
        (
            "v",
            (1, 3, 16, 16, 40),
            "float32",
            r"v: expected float32\[1, 3, 8, 16, 40\], got",
        ),
        ("summaries", (1, 3, 14, 2, 40), "int8", r"summaries: expected int8\[1, 3, 15, 2, 40\]"),
        ("summaries", (1, 3, 15, 2, 40), "uint8", "summaries: expected int8.* got uint8"),
        ("q", (1, 13, 40), "float32", "multiple of 3 KV heads, got"),
        ("q", (1, 12, 48), "float32", r"work.q: expected float32\[1, 12, 40\]"),
        ("q8", (1, 12, 40), "float32", "work.q8: expected int8"),
        ("k_units", (1, 3), "int32", r"work.k_units: expected int32\[1, 12\]"),
        ("granularity", (1, 12), "int32", r"work.granularity: expected int32\[1, 3\]"),
        ("host_blocks", (1, 3), "int32", r"work.host_blocks: expected int32\[1\]"),
        ("bitmap", (1, 12, 2), "uint32", r"work.bitmap: expected uint32\[1, 12, 1\]"),
    ],
)
def test_shapes_and_dtypes_are_checked(name, shape, dtype, message):
    case = cases.random_case(SHAPE)
    wrong = np.zeros(shape, dtype)
    if hasattr(case, name):
        setattr(case, name, wrong)
    else:
        case.work = case.work._replace(**{name: wrong})
    with pytest.raises(ValueError, match=message):
        submit("xla", case)


def test_what_no_submit_has_returned_is_no_tick():
    case = cases.random_case(SHAPE)
    operands = (case.work, case.k, case.v, case.summaries, case.flush, ())
    with pytest.raises(ValueError, match=r"tick: expected a host_ops\.Tick, got ndarray; pass"):
        host_ops.collect(np.zeros(2, np.int32), *operands, scale=1.0)
    wrong = host_ops.Tick(np.zeros(3, np.int32))
    with pytest.raises(ValueError, match=r"tick\.slot: expected int32\[2\], got int32\[3\]"):
        host_ops.collect(wrong, *operands, scale=1.0)


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("k", (1, 3, 7, 16, 48), "float32"),
        ("v", (1, 3, 6, 16, 40), "float32"),
        ("k", (1, 3, 7, 16, 40), "bfloat16"),
        ("summaries", (1, 3, 6, 2, 40), "int8"),
        ("shift", (1, 3, 7, 40), "int32"),
        ("first_block", (1, 3), "int32"),
        ("num_blocks", (3,), "int32"),
    ],
)
def test_the_flush_is_checked(name, shape, dtype):
    case = cases.random_case(SHAPE)
    flush = case.flush._replace(**{name: np.zeros(shape, dtype)})
    with pytest.raises(ValueError, match=rf"flush.{name}: expected .* got"):
        jax.eval_shape(host_ops.append, case.k, case.v, case.summaries, flush)


def test_something_to_select_from_is_needed():
    case = cases.random_case(SHAPE)
    case.summaries = None
    with pytest.raises(ValueError, match=r"host summaries or work.bitmap, got neither"):
        submit("xla", case)


def test_a_tick_of_another_implementation_is_refused(implementation):
    case = cases.random_case(SHAPE).with_work(boundary=np.full((1, 3), 8))
    other = "numpy" if implementation == "xla" else "xla"

    def step(work, k, v, summaries, flush):
        tick = host_ops.submit(work, k, v, summaries, scale=1.0, implementation=other)
        return host_ops.collect(
            tick,
            work,
            k,
            v,
            summaries,
            flush,
            (),
            scale=1.0,
            implementation=implementation,
        )

    cache = [cases.to_host(x) for x in (case.k, case.v, case.summaries)]
    result = jax.jit(step, donate_argnums=(1, 2, 3))(case.work, *cache, case.flush)
    assert result.status.tolist() == [host_ops.STATUS_INVALID]
    assert result.selection is None
    assert np.isneginf(result.lse).all()
