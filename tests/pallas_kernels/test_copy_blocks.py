"""Copying a run of blocks: every byte, nothing else."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from pallas_kernels import UnsupportedImplementationError, copy_blocks
from pallas_kernels.copy_blocks import copy_blocks_triton
from tests.pallas_kernels import lowering


def interpreted(cache, first, num_blocks, *, rows=None):
    first_row, batch = (None, cache.shape[0]) if rows is None else rows
    return copy_blocks_triton(cache, first, first_row, num_blocks, batch, interpret=True)


EXECUTIONS = [
    pytest.param(interpreted, id="interpreted"),
    pytest.param(functools.partial(copy_blocks, implementation="xla"), id="xla"),
    pytest.param(
        functools.partial(copy_blocks, implementation="triton"), id="gpu", marks=pytest.mark.gpu
    ),
]


@pytest.mark.parametrize("copy", EXECUTIONS)
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, "float32"), (96, "bfloat16"), (256, "int8")])
def test_copies_the_run(copy, head_dim, dtype):
    rng = np.random.default_rng(head_dim)
    cache = jnp.asarray(rng.integers(-99, 99, (2, 3, 24, 16, head_dim)), dtype)
    copy = jax.jit(copy, static_argnums=2)
    for first, count in ((0, 24), (7, 13), (23, 1)):
        got = copy(cache, jnp.asarray(first), count)
        assert got.dtype == cache.dtype
        np.testing.assert_array_equal(got, cache[:, :, first : first + count])


@pytest.mark.parametrize("copy", EXECUTIONS)
def test_copies_the_rows_of_a_layer_among_several(copy):
    cache = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3, 24, 16, 64)), jnp.float32)

    @jax.jit
    def run(cache, first, first_row):
        return copy(cache, first, 13, rows=(first_row, 2))

    for first_row in (0, 2, 3):
        got = run(cache, jnp.asarray(7), jnp.asarray([first_row], jnp.int32))
        np.testing.assert_array_equal(got, cache[first_row : first_row + 2, :, 7:20])


def test_pinned_blocks_go_through_the_kernel_alone():
    cpu = jax.devices("cpu")[0]
    cache = jax.ShapeDtypeStruct(
        (2, 8, 512, 16, 128), jnp.bfloat16,
        sharding=SingleDeviceSharding(cpu, memory_kind="pinned_host"),
    )  # fmt: skip
    first = jax.ShapeDtypeStruct((), jnp.int32)
    text = lowering.lower_for_cuda(lambda c, f: copy_blocks(c, f, 64), cache, first)
    assert "triton" in text
    assert "dynamic_slice" not in text


def test_refuses_what_is_not_there():
    cache = jnp.zeros((1, 1, 8, 16, 64))
    with pytest.raises(ValueError, match="expected 1 to 8 blocks, got 9"):
        copy_blocks(cache, jnp.asarray(0), 9)
    with (
        jax.default_device(jax.devices("cpu")[0]),
        pytest.raises(UnsupportedImplementationError, match="triton: expected a CUDA device"),
    ):
        copy_blocks(cache, jnp.asarray(0), 8, implementation="triton")
