"""The window's decode step in one kernel, against the operations that it stands for."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fluxion_jax as fx
from fluxion_jax.cache.append import make_flush
from fluxion_jax.cache.summaries import MIN_EXPONENT
from fluxion_jax.cache.window import window_mask, window_positions, write_token
from pallas_kernels import (
    UnsupportedImplementationError,
    window_attention,
    window_scores,
    window_step,
)
from tests.pallas_kernels import lowering

EXECUTIONS = [
    pytest.param(functools.partial(window_step, interpret=True), id="interpreted"),
    pytest.param(window_step, id="gpu", marks=pytest.mark.gpu),
]
SCALE = 0.125
# Empty, within the sinks, the first in the ring, before and after the first block leaves, a step in
# which a block leaves, around the ring many times.
LENGTHS = [0, 17, 32, 79, 80, 95, 96, 111, 4001]


def operands(dtype, head_dim, group, lengths=LENGTHS, seed=0, sinks=32, recent=48):
    rng = np.random.default_rng(seed)
    layout = fx.KVLayout(1, 2, head_dim, dtype, sink_tokens=sinks, recent_tokens=recent)
    batch, kv_heads = len(lengths), 2

    def normal(*shape, size=1.0):
        return jnp.asarray(rng.normal(size=shape) * size, jnp.float32)

    cache = fx.HostKV.allocate(layout, batch, 8192)
    window = (batch, kv_heads, layout.window_tokens, head_dim)
    # Channels of very different sizes, zeros among them, so that exponents grow in some.
    # They stay finite, for the largest of a number and of what is none is a GPU's own affair.
    largest = 13 if dtype == "float16" else 20
    sizes = 2.0 ** rng.integers(-20, largest, head_dim) * (rng.random(head_dim) < 0.9)
    cache = cache.replace(
        lengths=jnp.asarray(lengths, jnp.int32),
        window_k=((normal(*window) * sizes).astype(layout.jax_dtype),),
        window_v=(normal(*window).astype(layout.jax_dtype),),
        exponents=(jnp.asarray(rng.integers(-60, 3, (batch, kv_heads, head_dim)), jnp.int32),),
    )
    q = normal(batch, kv_heads * group, head_dim) / jnp.maximum(jnp.asarray(sizes), 1.0)
    new = [normal(batch, kv_heads, head_dim).astype(layout.jax_dtype) for _ in range(2)]
    return cache, q, *new


def by_xla(cache, q, k_new, v_new, active):
    layout = cache.layout
    flush, exponents = make_flush(
        cache, 0, k_new[:, :, None], v_new[:, :, None], active.astype(jnp.int32)
    )
    windows = [
        write_token(layout, window[0], new, cache.lengths, active)
        for window, new in ((cache.window_k, k_new), (cache.window_v, v_new))
    ]
    resident = window_mask(layout, cache.lengths + 1, cache.host_len) & active[:, None]
    state = window_attention(q, *windows, resident, scale=SCALE, implementation="xla")
    return state, windows, flush, exponents


def scores_by_xla(cache, q, k_new, v_new, active, newest_tokens=16):
    layout, lengths = cache.layout, cache.lengths
    window_k = write_token(layout, cache.window_k[0], k_new, lengths, active)
    resident = window_mask(layout, lengths + 1, cache.host_len) & active[:, None]
    return window_scores(
        q,
        window_k,
        window_positions(layout, lengths + 1, resident),
        lengths,
        scale=SCALE,
        sink_tokens=layout.sink_tokens,
        newest_tokens=newest_tokens,
    )


def by_kernel(step, cache, q, k_new, v_new, active, status=0, newest_tokens=None):
    sinks = cache.layout.sink_tokens
    constants = {"sinks": sinks, "least_exponent": MIN_EXPONENT, "scale": SCALE}
    return jax.jit(functools.partial(step, newest_tokens=newest_tokens, **constants))(
        *(q, k_new, v_new, cache.window_k[0], cache.window_v[0], cache.exponents[0]),
        *(cache.lengths, active, jnp.full(1, status, jnp.int32)),
    )


def check(got, want, active):
    state, windows, flush, exponents = want
    np.testing.assert_allclose(got.out, state[0], atol=2e-5)
    np.testing.assert_allclose(got.lse, state[1], rtol=1e-5, atol=2e-5)
    for found, expected in zip((got.window_k, got.window_v), windows, strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(got.num_blocks, flush.num_blocks)
    np.testing.assert_array_equal(got.exponents, exponents)
    np.testing.assert_array_equal(got.shift, flush.shift)
    leaves = np.asarray(flush.num_blocks) > 0
    assert leaves.any()
    assert not leaves.all()
    assert not leaves[~np.asarray(active)].any()
    for name, found in (("k", got.block_k), ("v", got.block_v), ("summaries", got.summaries)):
        expected = np.asarray(getattr(flush, name))
        np.testing.assert_array_equal(np.asarray(found)[leaves], expected[leaves], err_msg=name)


@pytest.mark.parametrize("step", EXECUTIONS)
@pytest.mark.parametrize(
    ("dtype", "head_dim", "group"),
    [("bfloat16", 128, 4), ("float32", 72, 3), ("float16", 64, 1)],
)
def test_equals_the_operations_that_it_stands_for(step, dtype, head_dim, group):
    arguments = operands(dtype, head_dim, group)
    active = jnp.asarray([True] * 8 + [False])
    got, want = by_kernel(step, *arguments, active), by_xla(*arguments, active)
    check(got, want, active)
    assert got.scores is None
    scored = by_kernel(step, *arguments, active, newest_tokens=16)
    check(scored, want, active)
    close = {"rtol": 1e-5, "atol": 2e-5}
    assert np.isfinite(want[0][1])[np.asarray(active)].all()
    np.testing.assert_allclose(scored.scores, scores_by_xla(*arguments, active), **close)
    assert np.isneginf(np.asarray(scored.scores)[-1]).all()


@pytest.mark.parametrize("step", EXECUTIONS)
@pytest.mark.parametrize("newest_tokens", [1, 16, 30])
@pytest.mark.parametrize("below", [0.0, 400.0])
def test_scores_of_sinks_and_of_the_newest_at_every_length(step, newest_tokens, below):
    """Also where the sinks are among the newest, and far below what the window attends to."""
    lengths = [*range(0, 100, 7), 31, 32, 33, 4001]
    cache, _, _, v_new = operands("float32", 64, 2, lengths)
    rng = np.random.default_rng(1)
    window_k = np.asarray(rng.normal(size=cache.window_k[0].shape), np.float32)
    window_k[:, :, :32, 0] -= below / SCALE
    cache = cache.replace(window_k=(jnp.asarray(window_k),))
    q = jnp.asarray(rng.normal(size=(len(lengths), 4, 64)), jnp.float32).at[..., 0].set(1.0)
    k_new = jnp.asarray(rng.normal(size=(len(lengths), 2, 64)), jnp.float32)
    arguments, active = (cache, q, k_new, v_new), jnp.ones(len(lengths), bool)
    got = by_kernel(step, *arguments, active, newest_tokens=newest_tokens)
    want = scores_by_xla(*arguments, active, newest_tokens)
    np.testing.assert_allclose(got.scores, want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("step", EXECUTIONS)
@pytest.mark.parametrize("low", ["sinks", "newest", "others"])
@pytest.mark.parametrize("sinks", [0, 64])
def test_scores_of_a_part_are_exact_over_several_steps_of_the_loop(step, low, sinks):
    """Whichever of them holds the largest score of the window, and the others far below it."""
    lengths = [20, 287, 1000, 1003]
    cache, q, k_new, v_new = operands("float32", 256, 2, lengths, sinks=sinks, recent=224)
    layout = cache.layout
    everywhere = jnp.ones((len(lengths), layout.window_tokens), bool)
    positions = window_positions(layout, cache.lengths + 1, everywhere)
    sink, newest = positions < sinks, positions > (cache.lengths - 16)[:, None]
    chosen = {"sinks": sink, "newest": newest, "others": ~sink & ~newest}[low][:, None]
    rng = np.random.default_rng(1)
    window_k = jnp.asarray(rng.normal(size=cache.window_k[0].shape), jnp.float32)
    window_k = window_k.at[..., 0].set(jnp.where(chosen, -400.0 / SCALE, 0.0))
    k_new = k_new.at[..., 0].set(-400.0 / SCALE if low == "newest" else 0.0)
    q = jnp.asarray(rng.normal(size=q.shape), jnp.float32).at[..., 0].set(1.0)
    cache = cache.replace(window_k=(window_k,))
    arguments, active = (cache, q, k_new, v_new), jnp.ones(len(lengths), bool)
    got = np.asarray(by_kernel(step, *arguments, active, newest_tokens=16).scores)
    np.testing.assert_allclose(got, scores_by_xla(*arguments, active), rtol=1e-5, atol=2e-5)
    assert np.isneginf(got[:, :, 1]).all() == (sinks == 0)
    if low != "others":
        column = {"sinks": 1, "newest": 2}[low]
        assert (got[1:, :, 0] - got[1:, :, column] > 300.0).all()


@pytest.mark.slow
@pytest.mark.parametrize("step", EXECUTIONS)
def test_a_window_step_after_step(step):
    """Each step takes what the one before left."""
    cache, *_ = operands("bfloat16", 64, 2, [60, 90])
    active = jnp.ones(2, bool)
    left = 0
    for seed in range(40):
        _, *arguments = operands("bfloat16", 64, 2, [60, 90], seed + 1)
        got, want = by_kernel(step, cache, *arguments, active), by_xla(cache, *arguments, active)
        np.testing.assert_allclose(got.out, want[0][0], atol=2e-5)
        np.testing.assert_array_equal(got.exponents, want[3])
        left += int(got.num_blocks.sum())
        cache = cache.replace(
            lengths=cache.lengths + 1,
            window_k=(got.window_k,),
            window_v=(got.window_v,),
            exponents=(got.exponents,),
        )
    assert left == 4


@pytest.mark.parametrize("step", EXECUTIONS)
def test_faults_stay_where_they_are(step):
    """What is not finite surfaces where it is attended to, widens bounds, and moves no scale."""
    cache, q, k_new, v_new = operands("float32", 64, 2, [95, 100, 20])
    k, v = (np.array(x[0]) for x in (cache.window_k, cache.window_v))
    # In the block that leaves row 0; in a slot of row 2 that holds nothing yet.
    k[0, 0, 32 + 3, 5], v[2, :, 40:] = np.inf, np.nan
    cache = cache.replace(window_k=(jnp.asarray(k),), window_v=(jnp.asarray(v),))
    active = jnp.ones(3, bool)
    arguments = (cache, q, k_new, v_new)
    got, want = by_kernel(step, *arguments, active), by_xla(*arguments, active)
    assert np.isfinite(np.asarray(got.out)[1:]).all()
    assert np.isnan(np.asarray(got.out)[0, :2]).any()
    np.testing.assert_array_equal(got.exponents, want[3])
    np.testing.assert_array_equal(got.summaries[0], want[2].summaries[0])
    assert np.asarray(got.summaries)[0, 0, 0, :, 5].tolist() == [-127, 127]


@pytest.mark.parametrize("step", EXECUTIONS)
@pytest.mark.parametrize("status", [1, 36])
def test_after_an_error_all_rows_stay_as_they_are(step, status):
    arguments = operands("float32", 64, 2)
    cache = arguments[0]
    active = jnp.ones(len(LENGTHS), bool)
    got = by_kernel(step, *arguments, active, status, newest_tokens=16)
    assert np.isneginf(np.asarray(got.lse)).all()
    assert np.isneginf(np.asarray(got.scores)).all()
    assert not np.asarray(got.num_blocks).any()
    np.testing.assert_array_equal(got.window_k, cache.window_k[0])
    np.testing.assert_array_equal(got.window_v, cache.window_v[0])
    np.testing.assert_array_equal(got.exponents, cache.exponents[0])


@pytest.mark.parametrize("newest_tokens", [None, 16])
def test_is_one_kernel_on_a_gpu(newest_tokens):
    cache, q, k_new, v_new = operands("bfloat16", 128, 4)
    arrays = (q, k_new, v_new, cache.window_k[0], cache.window_v[0], cache.exponents[0])
    text = lowering.lower_for_cuda(
        functools.partial(
            window_step, sinks=32, least_exponent=-60, scale=SCALE, newest_tokens=newest_tokens
        ),
        *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*arrays, cache.lengths)),
        jax.ShapeDtypeStruct(cache.lengths.shape, jnp.bool_),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    assert text.count("xla.gpu.triton") == 1


def test_is_refused_without_a_gpu():
    cache, q, k_new, v_new = operands("bfloat16", 128, 4)
    with (
        jax.default_device(jax.devices("cpu")[0]),
        pytest.raises(UnsupportedImplementationError, match="expected a CUDA device"),
    ):
        window_step(
            *(q, k_new, v_new, cache.window_k[0], cache.window_v[0], cache.exponents[0]),
            *(cache.lengths, cache.active, cache.status),
            sinks=32,
            least_exponent=-60,
            scale=SCALE,
        )
