"""The XLA version of block-sparse attention, and what is independent of the implementation."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_sparse_attention, share_attention
from tests.pallas_kernels import cases

ATTEND = jax.jit(
    functools.partial(block_sparse_attention, implementation="xla"), static_argnames="scale"
)


@pytest.mark.parametrize(
    ("group", "dtype"),
    [
        (1, "float32"),
        (3, "float32"),
        (3, "bfloat16"),
        (4, "bfloat16"),
        (7, "float16"),
        (7, "float32"),
        (8, "bfloat16"),
    ],
)
def test_matches_the_oracle_for_every_group_size(group, dtype):
    cases.check(ATTEND, cases.random_case(group=group, dtype=dtype))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("num_blocks", [24, 104])
def test_matches_the_oracle_for_odd_sizes(num_blocks, head_dim):
    case = cases.random_case(
        batch=1, num_kv_heads=2, group=3, num_blocks=num_blocks, head_dim=head_dim, fraction=0.7
    )
    cases.check(ATTEND, case)


@pytest.mark.parametrize("fraction", [0.01, 1.0])
def test_matches_the_oracle_at_small_and_full_selections(fraction):
    cases.check(ATTEND, cases.random_case(num_blocks=96, fraction=fraction))


def test_bfloat16_queries():
    case = cases.random_case(dtype="bfloat16")
    cases.check(ATTEND, case._replace(q=case.q.astype(jnp.bfloat16)))


def test_empty_sets_give_zero_and_minus_infinity():
    case = cases.empty_sets()
    cases.check(ATTEND, case)
    out, lse = ATTEND(case.q, case.k, case.v, case.bitmap, scale=case.scale)
    assert np.all(np.asarray(lse)[0] == -np.inf)
    assert np.all(np.asarray(out)[0] == 0.0)


def test_an_empty_selection_everywhere():
    case = cases.random_case(fraction=0.0)
    cases.check(ATTEND, case)


def test_bits_across_word_edges():
    cases.check(ATTEND, cases.word_edges())


def test_extreme_logits():
    cases.check(ATTEND, cases.extreme_logits())


def test_nan_surfaces_where_it_is_selected_and_nowhere_else():
    cases.check_nan(ATTEND)


def test_every_sequence_and_head_reads_its_own_cache():
    # One key and value block per KV head carries its own number.
    case = cases.random_case(batch=2, num_kv_heads=3, group=1, num_blocks=8)
    numbers = jnp.arange(6.0).reshape(2, 3, 1, 1, 1)
    out, _ = ATTEND(
        case.q, case.k, jnp.broadcast_to(numbers, case.v.shape), case.bitmap, scale=case.scale
    )
    np.testing.assert_allclose(out[..., 0], numbers[..., 0, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_does_not_touch_what_is_not_selected(dtype):
    case = cases.random_case(batch=1, num_kv_heads=2, num_blocks=512, dtype=dtype)
    compiled = ATTEND.lower(case.q, case.k, case.v, case.bitmap, scale=case.scale).compile()
    cache_bytes = case.k.size * case.k.dtype.itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < cache_bytes / 2
    entry_and_loops = [
        line for line in compiled.as_text().splitlines() if re.search(r"\[(1,)?2,512,16,64\]", line)
    ]
    assert entry_and_loops
    assert not [line for line in entry_and_loops if re.search(r" copy\(", line)]


def test_one_compilation_serves_every_selection():
    attend = jax.jit(
        functools.partial(block_sparse_attention, implementation="xla"), static_argnames="scale"
    )
    for fraction in (0.0, 0.2, 1.0):
        case = cases.random_case(fraction=fraction)
        attend(case.q, case.k, case.v, case.bitmap, scale=case.scale)
    assert attend._cache_size() == 1


def test_wrong_shapes_are_refused_with_what_is_expected():
    case = cases.random_case()
    with pytest.raises(ValueError, match=r"expected q \[B, N, H\].*got q \(2, 12, 64\)"):
        block_sparse_attention(case.q, case.k, case.v[:, :1], case.bitmap, scale=1.0)
    with pytest.raises(ValueError, match="correct the shapes"):
        block_sparse_attention(case.q, case.k, case.v, case.bitmap[..., :1], scale=1.0)


def test_the_share_from_a_boundary_on():
    share = jax.jit(
        functools.partial(share_attention, implementation="xla"), static_argnames="scale"
    )
    cases.check_share(share, cases.random_case(group=3, num_blocks=72))


def test_a_layer_among_several():
    share = jax.jit(
        functools.partial(share_attention, implementation="xla"), static_argnames="scale"
    )
    case = cases.random_case(group=3, num_blocks=72)
    cases.check_rows(share, case)
    for k, row in ((case.k, jnp.zeros((1,))), (case.k[:1], jnp.zeros((1,), jnp.int32))):
        with pytest.raises(ValueError, match="correct the shapes"):
            share(case.q, k, k, case.bitmap, None, first_row=row, scale=1.0)
