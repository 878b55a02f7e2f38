"""Calls on some rows of arrays that hold several layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import host_ops

ROWS, BATCH, HEADS, BLOCKS, SIZE = 6, 2, 1, 8, 8


ON_GPU = pytest.param("native", marks=[pytest.mark.native, pytest.mark.gpu], id="gpu")


@pytest.mark.parametrize(
    "implementation",
    [pytest.param("native", marks=pytest.mark.native), "xla", "numpy", ON_GPU],
)
@pytest.mark.parametrize("first", [0, 2, 4])
def test_append_writes_its_own_rows_only(implementation, first):
    status, k = append(implementation, first)
    assert status == 0
    expected = np.zeros_like(k)
    expected[first : first + BATCH, :, 3] = 1.0
    np.testing.assert_array_equal(k, expected)


@pytest.mark.parametrize(
    "implementation", [pytest.param("native", marks=pytest.mark.native), ON_GPU]
)
@pytest.mark.parametrize("first", [-1, ROWS - BATCH + 1, 2**31 - 1])
def test_rows_out_of_range_are_a_status(implementation, first):
    status, k = append(implementation, first)
    assert status == host_ops.STATUS_INVALID
    assert not k.any()


def append(implementation, first):
    flush = host_ops.Flush(
        k=jnp.ones((BATCH, HEADS, 1, 16, SIZE)),
        v=jnp.ones((BATCH, HEADS, 1, 16, SIZE)),
        summaries=jnp.zeros((BATCH, HEADS, 1, 2, SIZE), jnp.int8),
        shift=jnp.zeros((BATCH, HEADS, SIZE), jnp.int32),
        first_block=jnp.full((BATCH,), 3, jnp.int32),
        num_blocks=jnp.ones((BATCH,), jnp.int32),
    )
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    empty = [jnp.zeros((ROWS, HEADS, BLOCKS, 16, SIZE)) for _ in "kv"]
    k, v = (jax.device_put(x, host) for x in empty)
    run = jax.jit(
        lambda k, v, first: host_ops.append(
            k, v, None, flush, first_row=first, implementation=implementation
        ),
        donate_argnums=(0, 1),
        out_shardings=(host, host, None, None),
    )
    k, _, _, status = run(k, v, jnp.asarray([first], jnp.int32))
    return int(status[0]), np.array(k)
