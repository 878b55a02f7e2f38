"""Cutting tasks between host and device: the kernel against a plain loop."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import UnsupportedImplementationError, cut_tasks

EXECUTIONS = [
    pytest.param(True, id="interpreted"),
    pytest.param(False, id="gpu", marks=pytest.mark.gpu),
]


def in_a_loop(size, blocks, share, ahead, least):
    """Largest first, until the host has its part."""
    total = size.sum()
    left = host = np.clip((total + ahead) * share, 0.0, total)
    cut = np.where(host >= total, blocks, 0)
    for task in sorted(np.flatnonzero(size), key=lambda t: (-size[t], t)):
        part = min(left, size[task])
        left -= part
        if part < least or size[task] - part < least:
            part = size[task] if 2 * part >= size[task] else 0.0
        cut[task] = (
            blocks[task] if part >= size[task] else np.round(part / size[task] * blocks[task])
        )
    return cut


def cut(interpret, size, blocks, share, ahead, least):
    program = functools.partial(cut_tasks, least=least, interpret=interpret)
    operands = (jnp.float32(share), jnp.float32(ahead))
    return np.asarray(jax.jit(program)(jnp.asarray(size), jnp.asarray(blocks), *operands))


@pytest.mark.parametrize("interpret", EXECUTIONS)
@pytest.mark.parametrize("tasks", [1, 2, 7, 32, 128])
@pytest.mark.parametrize("least", [0, 1000])
def test_equals_a_loop(interpret, tasks, least):
    rng = np.random.default_rng(tasks + least)
    for share in (0.0, 0.001, 0.3, 0.61, 0.999, 1.0):
        # Powers of two, so that sums are exact in any order; ties and empty tasks among them.
        size = (1024.0 * rng.integers(0, 9, tasks)).astype(np.float32)
        blocks = rng.integers(0, 9000, tasks).astype(np.int32)
        for ahead in (0.0, -4096.0, 2.0**16):
            got = cut(interpret, size, blocks, share, ahead, least)
            wanted = in_a_loop(size.astype(float), blocks, np.float32(share), ahead, least)
            # A half may fall to either side where the share itself is rounded.
            np.testing.assert_allclose(got, wanted, atol=1)
            assert (np.abs(got - wanted) > 0).mean() < 0.1


@pytest.mark.parametrize("interpret", EXECUTIONS)
def test_nothing_to_read_goes_with_everything(interpret):
    blocks = np.asarray([5, 9], np.int32)
    nothing = np.zeros(2, np.float32)
    assert cut(interpret, nothing, blocks, 0.0, 0.0, 0).tolist() == [5, 9]
    some = np.asarray([0.0, 64.0], np.float32)
    assert cut(interpret, some, blocks, 0.0, 0.0, 0).tolist() == [0, 0]
    assert cut(interpret, some, blocks, 1.0, 0.0, 0).tolist() == [5, 9]


def test_too_many_tasks_are_left_to_xla(monkeypatch):
    with pytest.raises(UnsupportedImplementationError, match="at most 128 tasks, got 129"):
        cut(True, np.zeros(129, np.float32), np.zeros(129, np.int32), 0.5, 0.0, 0)


def test_no_kernel_without_a_gpu():
    if jax.default_backend() == "gpu":
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(UnsupportedImplementationError, match="expected a CUDA device"):
        cut(False, np.zeros(2, np.float32), np.zeros(2, np.int32), 0.5, 0.0, 0)
