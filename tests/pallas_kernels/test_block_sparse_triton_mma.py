"""The Triton-style kernel on tensor cores: interpreted for its results, lowered for its form."""

from __future__ import annotations

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import UnsupportedImplementationError, block_sparse_attention
from pallas_kernels.block_list_triton import block_table_triton
from pallas_kernels.block_sparse_triton_mma import (
    Tiling,
    attend_to_table,
    block_sparse_attention_triton_mma,
    share_attention_triton_mma,
)
from pallas_kernels.block_table import block_table
from tests.pallas_kernels import cases, lowering

# Few programs, so that a share is several tiles long and its last tile is not full.
INTERPRETED = jax.jit(
    functools.partial(block_sparse_attention_triton_mma, tiling=Tiling(programs=9), interpret=True),
    static_argnames="scale",
)
ON_GPU = jax.jit(
    functools.partial(block_sparse_attention, implementation="triton_mma"), static_argnames="scale"
)
ON_GPU_FEW_PROGRAMS = jax.jit(
    functools.partial(block_sparse_attention_triton_mma, tiling=Tiling(programs=9)),
    static_argnames="scale",
)
EXECUTIONS = [
    pytest.param(INTERPRETED, id="interpreted"),
    pytest.param(ON_GPU, id="gpu", marks=pytest.mark.gpu),
    pytest.param(ON_GPU_FEW_PROGRAMS, id="gpu, few programs", marks=pytest.mark.gpu),
]


def in_bfloat16(case):
    return case._replace(k=case.k.astype(jnp.bfloat16), v=case.v.astype(jnp.bfloat16))


@pytest.mark.parametrize("attend", EXECUTIONS)
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (3, 64), (4, 128), (7, 256)])
def test_matches_the_oracle(attend, group, head_dim):
    case = cases.random_case(group=group, dtype="bfloat16", head_dim=head_dim, num_blocks=40)
    cases.check(attend, case)


@pytest.mark.parametrize("attend", EXECUTIONS)
def test_matches_the_oracle_for_a_group_wider_than_one_product(attend):
    case = cases.random_case(
        batch=1, num_kv_heads=1, group=17, dtype="bfloat16", head_dim=16, num_blocks=40
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


@pytest.mark.parametrize("interpret", [True, pytest.param(False, marks=pytest.mark.gpu)])
def test_entries_after_the_last_of_a_table_mean_nothing(interpret):
    def attend(q, k, v, bitmap, *, scale):
        num_blocks = k.shape[2]
        table = block_table(bitmap, k.shape[1], num_blocks, tile_blocks=1)
        undefined = jnp.arange(num_blocks) >= table.total[:, None]
        table = table._replace(heads=jnp.where(undefined, -1, table.heads))
        return attend_to_table(
            q, k, v, table, scale=scale, tiling=Tiling(programs=9), interpret=interpret
        )

    case = cases.random_case(num_kv_heads=1, group=2, dtype="bfloat16", num_blocks=72)
    cases.check(jax.jit(attend, static_argnames="scale"), case)


@pytest.mark.parametrize("interpret", [True, pytest.param(False, marks=pytest.mark.gpu)])
def test_the_table_lists_every_selected_block_once_in_order(interpret):
    # Several chunks of words, the last not full, and a task without any block.
    num_blocks, num_kv_heads, group = 2600, 2, 3
    selected = np.random.default_rng(0).random((2, num_kv_heads * group, num_blocks)) < 0.1
    selected[1, :group] = False
    selected[0, :, -1] = True
    table = block_table_triton(
        jnp.asarray(cases.oracle.pack(selected)), num_kv_heads, num_blocks, interpret
    )
    of_task = selected.reshape(-1, group, num_blocks)
    for task, bits in enumerate(of_task):
        blocks = np.flatnonzero(bits.any(axis=0))
        assert table.total[task] == len(blocks)
        np.testing.assert_array_equal(table.block[task][: len(blocks)], blocks)
        heads = (bits[:, blocks] << np.arange(group)[:, None]).sum(axis=0)
        np.testing.assert_array_equal(table.heads[task][: len(blocks)], heads)


@pytest.mark.parametrize("interpret", [True, pytest.param(False, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("num_blocks", [40, 2112])
def test_the_listed_blocks_are_those_from_the_boundary_on(num_blocks, interpret):
    selected = np.random.default_rng(1).random((2, 6, num_blocks)) < 0.3
    selected[0, :2] = True
    # Before the first, on either side of the first word's end, within a word, behind the last.
    boundary = np.array([[31, 32, -3], [33, 0, num_blocks + 5]])
    table = block_table_triton(
        jnp.asarray(cases.oracle.pack(selected)), 3, num_blocks, interpret,
        boundary=jnp.asarray(boundary, jnp.int32),
    )  # fmt: skip
    for task, bits in enumerate(selected.reshape(-1, 2, num_blocks)):
        bits = bits & (np.arange(num_blocks) >= boundary.ravel()[task])
        blocks = np.flatnonzero(bits.any(axis=0))
        assert table.total[task] == len(blocks)
        np.testing.assert_array_equal(table.block[task][: len(blocks)], blocks)
        heads = (bits[:, blocks] << np.arange(2)[:, None]).sum(axis=0)
        np.testing.assert_array_equal(table.heads[task][: len(blocks)], heads)


@pytest.mark.parametrize("memory_kind", ["device", "pinned_host"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_lowers_for_cuda_without_a_copy_of_the_cache(head_dim, memory_kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = lowering.for_cuda(
            block_sparse_attention, "triton_mma", "bfloat16", memory_kind, head_dim
        )
    assert "triton" in text
    assert ("pinned_host" in text) == (memory_kind == "pinned_host")


def test_is_refused_by_name_without_a_gpu():
    case = in_bfloat16(cases.random_case(num_blocks=8))
    with (
        jax.default_device(jax.devices("cpu")[0]),
        pytest.raises(
            UnsupportedImplementationError,
            match="triton_mma: expected a CUDA device, got platform 'cpu'",
        ),
    ):
        block_sparse_attention(
            case.q, case.k, case.v, case.bitmap, scale=1.0, implementation="triton_mma"
        )


@pytest.mark.parametrize(
    ("head_dim", "group", "dtype", "reason"),
    [
        (96, 2, "bfloat16", "head size.*got 96"),
        (8, 2, "bfloat16", "at least 16, got 8"),
        (64, 33, "bfloat16", "got 33"),
        (64, 2, "float32", "expected bfloat16 keys and values, got float32; use 'triton'"),
    ],
)
def test_what_it_cannot_do_is_refused(head_dim, group, dtype, reason):
    case = cases.random_case(
        batch=1, num_kv_heads=1, head_dim=head_dim, group=group, num_blocks=8, dtype=dtype
    )
    with pytest.raises(UnsupportedImplementationError, match=reason):
        block_sparse_attention_triton_mma(
            case.q, case.k, case.v, case.bitmap, scale=1.0, interpret=True
        )


def test_the_share_from_a_boundary_on():
    share = jax.jit(
        functools.partial(share_attention_triton_mma, tiling=Tiling(programs=9), interpret=True),
        static_argnames="scale",
    )
    cases.check_share(share, cases.random_case(group=3, num_blocks=72, dtype="bfloat16"))


def test_a_layer_among_several():
    share = jax.jit(
        functools.partial(share_attention_triton_mma, tiling=Tiling(programs=9), interpret=True),
        static_argnames="scale",
    )
    cases.check_rows(share, cases.random_case(group=3, num_blocks=72, dtype="bfloat16"))
