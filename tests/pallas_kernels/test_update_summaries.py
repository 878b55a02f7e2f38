"""Kernels that write summaries, against the NumPy semantics of the host's append."""

from __future__ import annotations

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import UnsupportedImplementationError, update_summaries
from tests.pallas_kernels import lowering

module = importlib.import_module("pallas_kernels.update_summaries")
EXECUTIONS = [
    pytest.param(functools.partial(update_summaries, interpret=True), id="interpreted"),
    pytest.param(update_summaries, id="gpu", marks=pytest.mark.gpu),
]
BLOCKS = 24
LEVELS = [(0, 1), (BLOCKS, 2), (BLOCKS * 3 // 2, 4), (BLOCKS * 7 // 4, 8)]


def expected(keys, exponent):
    """Summaries afresh from integer keys `[B, K, n, 2, H]`, and which rows they fill."""
    low = np.floor(keys[:, :, :, 0] * 2.0**-exponent)
    high = np.ceil(keys[:, :, :, 1] * 2.0**-exponent)
    rows = {}
    for offset, size in LEVELS:
        for unit in range(-(-keys.shape[2] // size)):
            part = slice(unit * size, (unit + 1) * size)
            rows[offset + unit] = (low[:, :, part].min(axis=2), high[:, :, part].max(axis=2))
    return rows


@pytest.mark.parametrize("update", EXECUTIONS)
@pytest.mark.parametrize(
    ("head_dim", "at_once", "tile_rows"), [(64, 1, 64), (96, 3, 64), (64, 1, 8), (96, 3, 8)]
)
def test_writing_block_by_block_equals_summarising_afresh(
    update, head_dim, at_once, tile_rows, monkeypatch
):
    # Two programs for each of six tasks; with small tiles each has three.
    monkeypatch.setattr(module, "TILE_ROWS", tile_rows)
    monkeypatch.setattr(module, "MAX_PROGRAMS", 12)
    rng = np.random.default_rng(head_dim)
    written = 18
    # Ranges of integers that grow, so that exponents do too, in each channel at its own time.
    pace = rng.integers(2, 9, (2, 3, 1, 1, head_dim))
    reach = 31 << np.minimum(np.arange(written)[:, None, None] // pace, 4)
    keys = np.sort(rng.integers(-reach, reach + 1, (2, 3, written, 2, head_dim)), axis=3)
    update = jax.jit(update)
    summaries = jnp.asarray(
        rng.integers(-127, 128, (2, 3, BLOCKS * 15 // 8, 2, head_dim)), jnp.int8
    )
    exponent = np.zeros((2, 3, head_dim), np.int64)
    for first in range(0, written, at_once):
        block = keys[:, :, first : first + at_once]
        largest = np.abs(keys[:, :, : first + at_once]).max(axis=(2, 3))
        grown = np.maximum(np.ceil(np.log2(np.maximum(largest, 1) / 127)), 0).astype(np.int64)
        shift = grown - exponent
        exponent = grown
        scale = 2.0 ** -exponent[:, :, None]
        new = np.stack([np.floor(block[..., 0, :] * scale), np.ceil(block[..., 1, :] * scale)], 3)
        before = np.asarray(summaries)
        arguments = (jnp.asarray(new, jnp.int8), jnp.asarray(shift, jnp.int32), jnp.full(2, first))
        counts = jnp.asarray([block.shape[2], 0])
        # After a failure nothing is written at all.
        failed = update(jnp.array(before), *arguments, counts, jnp.full(1, 4))
        np.testing.assert_array_equal(failed, before)
        summaries = update(summaries, *arguments, counts, jnp.zeros(1, jnp.int32))
        # The second sequence writes nothing and stays as it is.
        np.testing.assert_array_equal(summaries[1], before[1])
        for row, (low, high) in expected(
            keys[:, :, : first + block.shape[2]], exponent[:, :, None]
        ).items():
            np.testing.assert_array_equal(summaries[0, :, row, 0], low[0], err_msg=f"row {row}")
            np.testing.assert_array_equal(summaries[0, :, row, 1], high[0], err_msg=f"row {row}")
    assert (exponent > 0).any()


@pytest.mark.parametrize("update", EXECUTIONS)
@pytest.mark.parametrize("first", [0, 1, 5])
def test_a_layer_among_several(update, first):
    rng = np.random.default_rng(first)
    draw = lambda *shape: rng.integers(-127, 128, shape).astype(np.int8)  # noqa: E731
    before = draw(7, 3, BLOCKS * 15 // 8, 2, 64)
    arguments = (
        jnp.asarray(draw(2, 3, 2, 2, 64)),
        jnp.asarray(rng.integers(0, 3, (2, 3, 64)), jnp.int32),
        *(jnp.asarray([9, 20]), jnp.asarray([2, 1]), jnp.zeros(1, jnp.int32)),
    )
    update = jax.jit(update)
    own = slice(first, first + 2)
    want = before.copy()
    want[own] = update(jnp.asarray(before[own]), *arguments)
    got = update(jnp.asarray(before), *arguments, jnp.asarray([first], jnp.int32))
    assert (want[own] != before[own]).any()
    np.testing.assert_array_equal(got, want)


def test_is_one_kernel_without_a_loop_of_xla_on_a_gpu():
    shapes = [(2, 8, 960, 2, 128), (2, 8, 4, 2, 128), (2, 8, 128), (2,), (2,), (1,)]
    kinds = [jnp.int8, jnp.int8, *[jnp.int32] * 4]
    text = lowering.lower_for_cuda(
        update_summaries,
        *(jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, kinds, strict=True)),
    )
    assert text.count("xla.gpu.triton") == 1
    assert "stablehlo.while" not in text


def test_is_refused_without_a_gpu():
    with (
        jax.default_device(jax.devices("cpu")[0]),
        pytest.raises(UnsupportedImplementationError, match="expected a CUDA device"),
    ):
        update_summaries(
            jnp.zeros((1, 1, 15, 2, 64), jnp.int8),
            jnp.zeros((1, 1, 1, 2, 64), jnp.int8),
            jnp.zeros((1, 1, 64), jnp.int32),
            jnp.zeros(1, jnp.int32),
            jnp.ones(1, jnp.int32),
            jnp.zeros(1, jnp.int32),
        )
