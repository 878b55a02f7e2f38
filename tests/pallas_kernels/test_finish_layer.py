"""The end of a layer in one kernel, against the operations that it stands for."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    SummaryUpdate,
    UnsupportedImplementationError,
    finish_layer,
    merge_states,
    update_summaries,
)
from tests.pallas_kernels import lowering

EXECUTIONS = [
    pytest.param(True, id="interpreted"),
    pytest.param(False, id="gpu", marks=pytest.mark.gpu),
]
BATCH, KV_HEADS, BLOCKS = 2, 3, 24


def operands(head_dim=64, group=3, shares=3, at_once=1, seed=0):
    rng = np.random.default_rng(seed)
    heads = (BATCH, KV_HEADS * group)

    def state():
        out = jnp.asarray(rng.normal(size=(*heads, head_dim)), jnp.float32)
        # Extreme ones, and empty sets among them.
        lse = rng.normal(size=heads) * 60
        return out, jnp.asarray(np.where(rng.random(heads) < 0.3, -np.inf, lse), jnp.float32)

    channels = (BATCH, KV_HEADS, head_dim)
    exponents = rng.integers(-60, 20, channels)
    shift = rng.integers(0, 2, channels) * rng.integers(0, 5, channels)
    rows = np.sort(rng.integers(-127, 128, (BATCH, KV_HEADS, BLOCKS * 15 // 8, 2, head_dim)), 3)
    new = np.sort(rng.integers(-127, 128, (BATCH, KV_HEADS, at_once, 2, head_dim)), 3)
    update = SummaryUpdate(
        jnp.asarray(rows, jnp.int8),
        jnp.asarray(new, jnp.int8),
        jnp.asarray(shift, jnp.int32),
        jnp.asarray([17, 4], jnp.int32),
        jnp.asarray([at_once, 0], jnp.int32),
    )
    exponents = jnp.asarray(exponents, jnp.int32)
    return [state() for _ in range(shares)], exponents, exponents + update.shift, update


def finish(interpret, states, exponents, grown, statuses, update, dtype="float32"):
    """The first status is the layer's own."""
    own, *earlier = (jnp.full(1, x, jnp.int32) for x in statuses)
    run = jax.jit(functools.partial(finish_layer, dtype=dtype, interpret=interpret))
    return run(states, exponents, grown, own, earlier, update)


@pytest.mark.parametrize("interpret", EXECUTIONS)
@pytest.mark.parametrize(
    ("head_dim", "group", "shares", "dtype", "at_once"),
    [
        (128, 4, 3, "bfloat16", 1),
        (96, 7, 2, "float32", 3),
        (64, 1, 1, "float16", 2),
        (72, 8, 3, "float32", 1),
    ],
)
def test_equals_the_operations_that_it_stands_for(
    interpret, head_dim, group, shares, dtype, at_once
):
    states, exponents, grown, update = operands(head_dim, group, shares, at_once)
    got = finish(interpret, states, exponents, grown, [0, 0, 0], update, dtype)
    out, lse = merge_states(states, implementation="xla")
    assert got.out.dtype == dtype
    close = {"float32": 1e-6, "bfloat16": 8e-3, "float16": 1e-3}[dtype]
    np.testing.assert_allclose(got.out.astype(jnp.float32), out, rtol=close, atol=close)
    np.testing.assert_allclose(got.lse, lse, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(got.exponents, grown)
    assert got.status == 0
    summaries = update_summaries(*update[:5], jnp.zeros(1, jnp.int32), interpret=interpret)
    np.testing.assert_array_equal(got.summaries, summaries)
    assert (np.asarray(summaries[0]) != np.asarray(update.summaries[0])).any()


@pytest.mark.parametrize("interpret", EXECUTIONS)
@pytest.mark.parametrize("statuses", [(4, 0, 0), (0, 8, 2), (1, 1, 32)])
def test_only_what_went_wrong_in_the_layer_itself_keeps_what_is_there(interpret, statuses):
    """Of an earlier error the layer knew before it wrote its block, or wrote none."""
    states, exponents, grown, update = operands()
    got = finish(interpret, states, exponents, grown, statuses, update)
    assert got.status == statuses[0] | statuses[1] | statuses[2]
    failed = statuses[0] != 0
    np.testing.assert_array_equal(got.exponents, exponents if failed else grown)
    kept = (np.asarray(got.summaries) == np.asarray(update.summaries)).all()
    assert kept == failed


@pytest.mark.parametrize("interpret", EXECUTIONS)
@pytest.mark.parametrize("place", [None, 0, 2, 4])
def test_one_of_many_statuses_counts_wherever_it_is(interpret, place):
    states, exponents, grown, _ = operands()
    statuses = np.zeros(5, np.int32)
    if place is not None:
        statuses[place] = 8
    own, other = jnp.zeros(1, jnp.int32), jnp.full(1, 2, jnp.int32)
    run = jax.jit(functools.partial(finish_layer, dtype="float32", interpret=interpret))
    got = run(states, exponents, grown, own, [other, jnp.asarray(statuses)], None)
    assert got.status == (2 if place is None else 10)
    np.testing.assert_array_equal(got.exponents, grown)


@pytest.mark.parametrize("interpret", EXECUTIONS)
@pytest.mark.parametrize("first", [0, 1, 5])
def test_summaries_of_a_layer_among_several(interpret, first):
    states, exponents, grown, update = operands(at_once=2)
    want = np.asarray(finish(interpret, states, exponents, grown, [0], update).summaries)
    before = np.random.default_rng(3).integers(-127, 128, (7, *want.shape[1:])).astype(np.int8)
    before[first : first + BATCH] = update.summaries
    among = update._replace(
        summaries=jnp.asarray(before), first_row=jnp.asarray([first], jnp.int32)
    )
    got = finish(interpret, states, exponents, grown, [0], among).summaries
    before[first : first + BATCH] = want
    np.testing.assert_array_equal(got, before)


@pytest.mark.parametrize("interpret", EXECUTIONS)
def test_without_summaries(interpret):
    states, exponents, grown, update = operands()
    want = finish(interpret, states, exponents, grown, [0, 2], update)
    got = finish(interpret, states, exponents, grown, [0, 2], None)
    assert got.summaries is None
    for name in ("out", "lse", "exponents", "status"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)


@pytest.mark.parametrize("interpret", EXECUTIONS)
def test_empty_sets_and_faults(interpret):
    """Nothing at all is 0 and -inf; an empty set's output never counts; a NaN surfaces."""
    states, exponents, grown, _ = operands(shares=2)
    (one, one_lse), (two, two_lse) = (tuple(map(np.array, x)) for x in states)
    one_lse[:, 0] = two_lse[:, 0] = -np.inf
    one[:, :2], one_lse[:, 1], two_lse[:, 1] = np.nan, -np.inf, 1.0
    one_lse[:, 2], two_lse[:, 2], two[:, 2, 5] = 0.0, 0.0, np.nan
    got = finish(interpret, [(one, one_lse), (two, two_lse)], exponents, grown, [0], None)
    assert not np.asarray(got.out)[:, 0].any()
    assert np.isneginf(np.asarray(got.lse)[:, 0]).all()
    np.testing.assert_allclose(got.out[:, 1], two[:, 1], rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(np.asarray(got.out)[:, 2]).sum(axis=-1), 1)


def test_is_one_kernel_on_a_gpu():
    states, exponents, grown, update = operands(128, 4)
    leaves, structure = jax.tree.flatten((states, exponents, grown, update))

    def run(status, *leaves):
        states, exponents, grown, update = jax.tree.unflatten(structure, leaves)
        return finish_layer(states, exponents, grown, status, [status], update, dtype="bfloat16")

    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
    text = lowering.lower_for_cuda(run, jax.ShapeDtypeStruct((1,), jnp.int32), *shapes)
    assert text.count("xla.gpu.triton") == 1


def test_is_refused_without_a_gpu():
    states, exponents, grown, _ = operands()
    with (
        jax.default_device(jax.devices("cpu")[0]),
        pytest.raises(UnsupportedImplementationError, match="expected a CUDA device"),
    ):
        finish(False, states, exponents, grown, [0], None)
