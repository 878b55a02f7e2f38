"""The scoring kernel: interpreted for its results, lowered for CUDA for its form."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from pallas_kernels import UnsupportedImplementationError, score_units
from pallas_kernels.scoring_triton import score_units_triton
from tests.pallas_kernels import lowering, oracle

interpreted = jax.jit(functools.partial(score_units_triton, interpret=True))
ON_GPU = jax.jit(functools.partial(score_units, implementation="triton"))
EXECUTIONS = [
    pytest.param(interpreted, id="interpreted"),
    pytest.param(ON_GPU, id="gpu", marks=pytest.mark.gpu),
]
GRANULARITY = np.array([[16, 32], [64, 128], [32, 16]], np.int32)
RANKED = np.array([[True, True], [True, False], [True, True]])


@pytest.mark.parametrize("score", EXECUTIONS)
@pytest.mark.parametrize(
    ("group", "num_blocks", "head_dim"), [(1, 8, 64), (3, 24, 96), (4, 40, 128), (7, 72, 256)]
)
def test_scores_equal_the_oracle(score, group, num_blocks, head_dim):
    rng = np.random.default_rng(num_blocks)
    rows = num_blocks * 15 // 8
    summaries = rng.integers(-127, 128, size=(3, 2, rows, 2, head_dim)).astype(np.int8)
    summaries.sort(axis=3)
    q8 = rng.integers(-127, 128, size=(3, 2 * group, head_dim)).astype(np.int8)
    host_blocks = np.array([num_blocks, num_blocks - 3, 0], np.int32)
    want = oracle.score_units(q8, summaries, GRANULARITY, host_blocks)
    want[~np.repeat(RANKED, group, axis=1)] = np.iinfo(np.int32).min
    for ranked in (RANKED, RANKED * np.int32(7)):
        got = score(*map(jnp.asarray, (q8, summaries, GRANULARITY, host_blocks, ranked)))
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("score", [*EXECUTIONS, pytest.param(jax.jit(score_units), id="default")])
def test_summaries_of_a_layer_among_several(score):
    rng = np.random.default_rng(5)
    summaries = rng.integers(-127, 128, size=(9, 2, 45, 2, 64)).astype(np.int8)
    summaries.sort(axis=3)
    q8 = rng.integers(-127, 128, size=(3, 6, 64)).astype(np.int8)
    arguments = (GRANULARITY, np.array([24, 21, 0], np.int32), RANKED)
    for first in (0, 2, 6):
        want = score(*map(jnp.asarray, (q8, summaries[first : first + 3], *arguments)))
        got = score(*map(jnp.asarray, (q8, summaries, *arguments)), first_row=jnp.asarray([first]))
        np.testing.assert_array_equal(got, want)


def test_sizes_whose_offsets_triton_takes_wrongly_are_refused():
    # Traced only: 3 GiB of summaries.
    summaries = jax.ShapeDtypeStruct((3, 8, 1 << 19, 2, 128), jnp.int8)
    small = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((3, 8), (3,), (3, 8))]
    with pytest.raises(UnsupportedImplementationError, match="at most 2147483648 bytes"):
        jax.eval_shape(
            functools.partial(score_units_triton, interpret=True),
            *(jax.ShapeDtypeStruct((3, 8, 128), jnp.int8), summaries, *small),
        )


@pytest.mark.parametrize("score", EXECUTIONS)
def test_the_largest_scores_are_exact(score):
    q8 = np.full((1, 2, 256), 127, np.int8)
    q8[0, 1] *= -1
    summaries = np.full((1, 1, 15, 2, 256), 127, np.int8)
    summaries[..., 0, :] = -127
    got = score(
        *map(jnp.asarray, (q8, summaries, np.full((1, 1), 16), np.array([8]), np.ones((1, 1))))
    )
    np.testing.assert_array_equal(got, np.full((1, 2, 8), 127 * 127 * 256))


def lowered(memory_kind: str) -> str:
    cpu = jax.devices("cpu")[0]
    summaries = jax.ShapeDtypeStruct(
        (2, 8, 7680, 2, 128), jnp.int8,
        sharding=SingleDeviceSharding(cpu, memory_kind=memory_kind),
    )  # fmt: skip
    q8 = jax.ShapeDtypeStruct((2, 32, 128), jnp.int8)
    granularity = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    return lowering.lower_for_cuda(
        score_units, q8, summaries, granularity, jax.ShapeDtypeStruct((2,), jnp.int32)
    )


@pytest.mark.parametrize("memory_kind", ["device", "pinned_host"])
def test_is_the_default_on_a_gpu_and_takes_the_summaries_where_they_lie(memory_kind):
    text = lowered(memory_kind)
    assert "triton" in text
    assert ("pinned_host" in text) == (memory_kind == "pinned_host")
    assert "xi8>) -> tensor<2x8x7680" not in text


def test_is_refused_by_name_without_a_gpu():
    with (
        jax.default_device(jax.devices("cpu")[0]),
        pytest.raises(UnsupportedImplementationError, match="triton: expected a CUDA device"),
    ):
        score_units(
            jnp.zeros((1, 2, 64), jnp.int8),
            jnp.zeros((1, 1, 15, 2, 64), jnp.int8),
            jnp.array([[16]]),
            jnp.array([8]),
            implementation="triton",
        )
