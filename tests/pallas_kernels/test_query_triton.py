"""The kernel that quantises queries, against XLA's operations."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxion_jax.cache.summaries import quantise_query as by_xla
from pallas_kernels import UnsupportedImplementationError, quantise_query
from tests.pallas_kernels import lowering

EXECUTIONS = [
    pytest.param(functools.partial(quantise_query, interpret=True), id="interpreted"),
    pytest.param(quantise_query, id="gpu", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("quantise", EXECUTIONS)
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (3, 72), (4, 128), (7, 256)])
def test_equals_the_operations_that_it_stands_for(quantise, group, head_dim):
    rng = np.random.default_rng(group)
    q = rng.normal(size=(3, 2 * group, head_dim)).astype(np.float32)
    # One head is zero, others are faulty, and exponents make products overflow.
    q[0, 0], q[0, -1, 5], q[1, 0, 7] = 0.0, np.nan, np.inf
    q[2] *= 1e30
    exponents = rng.integers(-60, 20, (3, 2, head_dim)).astype(np.int32)
    shared = np.array([[0, 1], [1, 0], [0, 1]], np.int32)
    got = np.asarray(jax.jit(quantise)(q, exponents, shared)).astype(int)
    want = np.asarray(by_xla(q, exponents, shared)).astype(int)
    # A GPU divides with an error of two units in the last place, so ties may fall either way.
    assert abs(got - want).max() <= 1
    assert (got != want).mean() < 1e-3
    assert (got[0, 0] == 0).all()
    assert (got[0, -1] == 0).all()
    assert (got[1, 0] == 0).all()
    alone = got[0, :group] if group > 1 else got[1, group:]
    assert set(abs(alone[1:] if group > 1 else alone).max(axis=-1)) == {127}
    together = got[2, group:]
    assert abs(together).max() == 127


def test_rounds_ties_to_even():
    q = np.zeros((1, 1, 64), np.float32)
    q[0, 0, :6] = [127.0, 0.5, 1.5, 2.5, -0.5, -1.5]
    got = quantise_query(
        jnp.asarray(q), jnp.zeros((1, 1, 64), jnp.int32), jnp.zeros((1, 1), bool), interpret=True
    )
    assert (
        np.asarray(got)[0, 0, :6].tolist()
        == np.asarray(
            by_xla(jnp.asarray(q), jnp.zeros((1, 1, 64), jnp.int32), jnp.zeros((1, 1), bool))
        )[0, 0, :6].tolist()
    )


def test_is_one_kernel_on_a_gpu():
    text = lowering.lower_for_cuda(
        quantise_query,
        jax.ShapeDtypeStruct((2, 32, 128), jnp.float32),
        jax.ShapeDtypeStruct((2, 8, 128), jnp.int32),
        jax.ShapeDtypeStruct((2, 8), jnp.bool_),
    )
    assert text.count("xla.gpu.triton") == 1


def test_is_refused_without_a_gpu():
    with (
        jax.default_device(jax.devices("cpu")[0]),
        pytest.raises(UnsupportedImplementationError, match="expected a CUDA device"),
    ):
        quantise_query(
            jnp.zeros((1, 1, 64)), jnp.zeros((1, 1, 64), jnp.int32), jnp.zeros((1, 1), bool)
        )
