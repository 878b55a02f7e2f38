"""What of the block-sparse kernels can only be seen on a GPU: pinned memory and large offsets."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

import host_ops
from pallas_kernels import block_sparse_attention, share_attention
from tests.pallas_kernels import cases

pytestmark = pytest.mark.gpu

KERNELS = ["mosaic", "triton", "triton_mma", "wgmma"]
ATTEND = jax.jit(block_sparse_attention, static_argnames=("scale", "implementation"))


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [("mosaic", "float32"), ("triton", "float32"), *((name, "bfloat16") for name in KERNELS)],
)
def test_reads_keys_and_values_from_pinned_memory(implementation, dtype):
    case = cases.random_case(num_blocks=256, head_dim=128, dtype=dtype)
    pinned = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    k, v = (jax.device_put(x, pinned) for x in (case.k, case.v))

    @functools.partial(jax.jit, static_argnames="scale")
    def attend(q, k, v, bitmap, *, scale):
        # As a decode step does, because wgmma takes operands in device memory only.
        k, v = (host_ops.retag(x, host_ops.DEVICE) for x in (k, v))
        return block_sparse_attention(q, k, v, bitmap, scale=scale, implementation=implementation)

    cases.check(lambda q, _k, _v, *rest, **named: attend(q, k, v, *rest, **named), case)


@pytest.mark.parametrize("implementation", [*KERNELS, "xla"])
def test_the_share_from_a_boundary_on(implementation):
    share = jax.jit(share_attention, static_argnames=("scale", "implementation"))
    case = cases.random_case(group=3, num_blocks=72, head_dim=128, dtype="bfloat16")
    cases.check_share(functools.partial(share, implementation=implementation), case)


@pytest.mark.parametrize("implementation", [*KERNELS, "xla"])
def test_a_layer_among_several(implementation):
    share = jax.jit(share_attention, static_argnames=("scale", "implementation"))
    case = cases.random_case(group=3, num_blocks=72, head_dim=128, dtype="bfloat16")
    cases.check_rows(functools.partial(share, implementation=implementation), case)


@pytest.mark.parametrize("implementation", KERNELS)
def test_a_layer_beyond_32_bits(implementation):
    """Rows whose offset counts more elements than 32 bits can."""
    rows, num_blocks, head_dim = 40, 2**15 + 8, 128
    shape = (rows, 1, num_blocks, 16, head_dim)
    assert np.prod(shape) > 2**31
    k = jnp.zeros(shape, jnp.bfloat16).at[rows - 1, 0, 7].set(1.0)
    v = jnp.zeros(shape, jnp.bfloat16).at[rows - 1, 0, 7].set(3.0)
    bits = np.zeros((1, 1, num_blocks), bool)
    bits[0, 0, 7] = True
    bitmap = jnp.asarray(cases.oracle.pack(bits))
    share = jax.jit(share_attention, static_argnames=("scale", "implementation"))
    out, lse, blocks = share(
        jnp.ones((1, 1, head_dim)), k, v, bitmap, None, scale=1.0,
        first_row=jnp.asarray([rows - 1], jnp.int32), implementation=implementation,
    )  # fmt: skip
    np.testing.assert_allclose(out[0, 0], 3.0)
    np.testing.assert_allclose(lse[0, 0], head_dim + np.log(16.0), rtol=1e-6)
    assert blocks.tolist() == [[1]]


@pytest.mark.parametrize("implementation", [*KERNELS, "xla"])
def test_offsets_beyond_32_bits(implementation):
    num_blocks, head_dim = 2**17 + 8, 128
    shape = (1, 10, num_blocks, 16, head_dim)
    assert np.prod(shape) > 2**31
    far = num_blocks - 5
    k = jnp.zeros(shape, jnp.bfloat16).at[0, 9, far].set(1.0)
    v = jnp.zeros(shape, jnp.bfloat16).at[0, 9, far].set(3.0)
    bits = np.zeros((1, 10, num_blocks), bool)
    bits[0, 9, far] = True
    bitmap = jnp.asarray(cases.oracle.pack(bits))
    q = jnp.ones((1, 10, head_dim))
    out, lse = ATTEND(q, k, v, bitmap, scale=1.0, implementation=implementation)
    np.testing.assert_allclose(out[0, 9], 3.0)
    np.testing.assert_allclose(lse[0, 9], head_dim + np.log(16.0), rtol=1e-6)
    assert np.all(np.asarray(out)[0, :9] == 0.0)


@pytest.mark.parametrize("implementation", KERNELS)
def test_same_bits_every_time(implementation):
    case = cases.random_case(num_blocks=200, head_dim=128, dtype="bfloat16")
    first, second = (
        ATTEND(case.q, case.k, case.v, case.bitmap, scale=0.1, implementation=implementation)
        for _ in range(2)
    )
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])


def test_none_takes_the_best_that_works():
    case = cases.random_case(head_dim=64)
    cases.check(jax.jit(block_sparse_attention, static_argnames="scale"), case)
    odd = cases.random_case(head_dim=24)
    cases.check(jax.jit(block_sparse_attention, static_argnames="scale"), odd)
