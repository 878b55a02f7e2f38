"""The Mosaic GPU kernel: interpreted for its results, lowered for CUDA for its form."""

from __future__ import annotations

import functools
import warnings

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import UnsupportedImplementationError, block_sparse_attention
from pallas_kernels.block_sparse_mosaic import block_sparse_attention_mosaic
from pallas_kernels.compat import mosaic_interpreter
from tests.pallas_kernels import cases, lowering

INTERPRETER = mosaic_interpreter()
INTERPRETED = jax.jit(
    functools.partial(block_sparse_attention_mosaic, interpret=INTERPRETER),
    static_argnames="scale",
)
ON_GPU = jax.jit(
    functools.partial(block_sparse_attention, implementation="mosaic"), static_argnames="scale"
)
INTERPRETABLE = pytest.mark.skipif(
    INTERPRETER is None, reason="JAX 0.10 cannot interpret Mosaic kernels"
)
EXECUTIONS = [
    pytest.param(INTERPRETED, id="interpreted", marks=INTERPRETABLE),
    pytest.param(ON_GPU, id="gpu", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("attend", EXECUTIONS)
@pytest.mark.parametrize(
    ("group", "dtype", "head_dim"),
    [
        (1, "float32", 64),
        (3, "bfloat16", 64),
        (2, "float16", 64),
        (4, "float32", 128),
        (7, "bfloat16", 256),
    ],
)
def test_matches_the_oracle(attend, group, dtype, head_dim):
    case = cases.random_case(group=group, dtype=dtype, head_dim=head_dim, num_blocks=24)
    cases.check(attend, case)


@pytest.mark.parametrize("attend", EXECUTIONS)
@pytest.mark.parametrize("make", [cases.empty_sets, cases.word_edges, cases.extreme_logits])
def test_matches_the_oracle_in_hard_cases(attend, make):
    cases.check(attend, make())


@pytest.mark.parametrize("attend", EXECUTIONS)
def test_nan_surfaces_where_it_is_selected_and_nowhere_else(attend):
    cases.check_nan(attend)


@pytest.mark.parametrize(
    "interpret",
    [
        pytest.param(INTERPRETER, id="interpreted", marks=INTERPRETABLE),
        pytest.param(None, id="gpu", marks=pytest.mark.gpu),
    ],
)
def test_one_program_takes_several_tiles(interpret):
    attend = jax.jit(
        functools.partial(block_sparse_attention_mosaic, programs=9, interpret=interpret),
        static_argnames="scale",
    )
    cases.check(attend, cases.random_case(num_kv_heads=1, group=2, num_blocks=72, fraction=0.6))


@pytest.mark.parametrize("memory_kind", ["device", "pinned_host"])
@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [
        (64, "float32"),
        (64, "bfloat16"),
        (128, "bfloat16"),
        (128, "float16"),
        (256, "float32"),
        (256, "bfloat16"),
    ],
)
def test_lowers_for_cuda_without_a_copy_of_the_cache(head_dim, dtype, memory_kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = lowering.for_cuda(block_sparse_attention, "mosaic", dtype, memory_kind, head_dim)
    assert "mosaic" in text
    assert ("pinned_host" in text) == (memory_kind == "pinned_host")


def test_is_refused_by_name_without_a_gpu():
    case = cases.random_case(num_blocks=8)
    with (
        jax.default_device(jax.devices("cpu")[0]),
        pytest.raises(
            UnsupportedImplementationError,
            match="mosaic: expected a CUDA device, got platform 'cpu'",
        ),
    ):
        block_sparse_attention(
            case.q, case.k, case.v, case.bitmap, scale=1.0, implementation="mosaic"
        )


@pytest.mark.parametrize(
    ("head_dim", "group", "reason"), [(96, 2, "head size.*got 96"), (64, 33, "got 33")]
)
def test_sizes_that_it_cannot_do_are_refused(head_dim, group, reason):
    case = cases.random_case(batch=1, num_kv_heads=1, head_dim=head_dim, group=group, num_blocks=8)
    with pytest.raises(UnsupportedImplementationError, match=reason):
        block_sparse_attention_mosaic(
            case.q, case.k, case.v, jnp.asarray(case.bitmap), scale=1.0, interpret=object()
        )


@INTERPRETABLE
def test_a_layer_among_several():
    @functools.partial(jax.jit, static_argnames="scale")
    def attend(q, k, v, bitmap, _, *, scale, first_row=None):
        return block_sparse_attention_mosaic(
            q, k, v, bitmap, first_row, scale=scale, interpret=INTERPRETER
        )

    cases.check_rows(attend, cases.random_case(num_kv_heads=2, group=2, num_blocks=24))
