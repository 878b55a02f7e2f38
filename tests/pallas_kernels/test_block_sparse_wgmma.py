"""The Mosaic GPU kernel on tensor cores: interpreted for its results, lowered for its form."""

from __future__ import annotations

import functools
import warnings

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import UnsupportedImplementationError, block_sparse_attention
from pallas_kernels.block_sparse_wgmma import (
    Tiling,
    block_sparse_attention_wgmma,
    share_attention_wgmma,
)
from pallas_kernels.compat import mosaic_interpreter
from tests.pallas_kernels import cases, lowering

INTERPRETER = mosaic_interpreter()
# Few programs, so that a share takes more tiles than fit at once and its last is not full.
FEW_PROGRAMS = Tiling(programs=3, stages=3)
INTERPRETED = jax.jit(
    functools.partial(block_sparse_attention_wgmma, tiling=FEW_PROGRAMS, interpret=INTERPRETER),
    static_argnames="scale",
)
ON_GPU = jax.jit(
    functools.partial(block_sparse_attention, implementation="wgmma"), static_argnames="scale"
)
ON_GPU_FEW_PROGRAMS = jax.jit(
    functools.partial(block_sparse_attention_wgmma, tiling=FEW_PROGRAMS), static_argnames="scale"
)
INTERPRETABLE = pytest.mark.skipif(
    INTERPRETER is None, reason="JAX 0.10 cannot interpret Mosaic kernels"
)
EXECUTIONS = [
    pytest.param(INTERPRETED, id="interpreted", marks=INTERPRETABLE),
    pytest.param(ON_GPU, id="gpu", marks=pytest.mark.gpu),
    pytest.param(ON_GPU_FEW_PROGRAMS, id="gpu, few programs", marks=pytest.mark.gpu),
]


def in_bfloat16(case):
    return case._replace(k=case.k.astype(jnp.bfloat16), v=case.v.astype(jnp.bfloat16))


@pytest.mark.parametrize("attend", EXECUTIONS)
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (4, 128), (11, 64), (7, 256)])
def test_matches_the_oracle(attend, group, head_dim):
    case = cases.random_case(
        num_kv_heads=1, group=group, dtype="bfloat16", head_dim=head_dim, num_blocks=40
    )
    cases.check(attend, case)


@pytest.mark.parametrize("attend", EXECUTIONS)
@pytest.mark.parametrize("make", [cases.empty_sets, cases.word_edges, cases.extreme_logits])
def test_matches_the_oracle_in_hard_cases(attend, make):
    cases.check(attend, in_bfloat16(make()))


@pytest.mark.parametrize("attend", EXECUTIONS)
def test_nan_surfaces_where_it_is_selected_and_nowhere_else(attend):
    def in_bfloat16(q, k, v, bitmap, *, scale):
        return attend(q, k.astype(jnp.bfloat16), v.astype(jnp.bfloat16), bitmap, scale=scale)

    cases.check_nan(in_bfloat16)


@pytest.mark.parametrize("memory_kind", ["device", "pinned_host"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_lowers_for_cuda_without_a_copy_of_the_cache(head_dim, memory_kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = lowering.for_cuda(block_sparse_attention, "wgmma", "bfloat16", memory_kind, head_dim)
    assert "mosaic" in text
    assert ("pinned_host" in text) == (memory_kind == "pinned_host")


def test_is_refused_by_name_without_a_gpu():
    case = in_bfloat16(cases.random_case(num_blocks=8))
    with (
        jax.default_device(jax.devices("cpu")[0]),
        pytest.raises(
            UnsupportedImplementationError,
            match="wgmma: expected a CUDA device, got platform 'cpu'",
        ),
    ):
        block_sparse_attention(
            case.q, case.k, case.v, case.bitmap, scale=1.0, implementation="wgmma"
        )


@pytest.mark.parametrize(
    ("head_dim", "group", "dtype", "reason"),
    [
        (96, 2, "bfloat16", "head size.*got 96"),
        (64, 33, "bfloat16", "got 33"),
        (64, 2, "float32", "expected bfloat16 keys and values, got float32; use 'triton'"),
    ],
)
def test_what_it_cannot_do_is_refused(head_dim, group, dtype, reason):
    case = cases.random_case(
        batch=1, num_kv_heads=1, head_dim=head_dim, group=group, num_blocks=8, dtype=dtype
    )
    with pytest.raises(UnsupportedImplementationError, match=reason):
        block_sparse_attention_wgmma(
            case.q, case.k, case.v, case.bitmap, scale=1.0, interpret=object()
        )


@INTERPRETABLE
def test_a_layer_among_several():
    share = jax.jit(
        functools.partial(share_attention_wgmma, tiling=FEW_PROGRAMS, interpret=INTERPRETER),
        static_argnames="scale",
    )
    case = cases.random_case(num_kv_heads=2, group=2, num_blocks=24, dtype="bfloat16")
    cases.check_rows(share, case)
