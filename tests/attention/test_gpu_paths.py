"""On a GPU: every split, kernel and place of summaries gives the same, in place and up to date."""

from __future__ import annotations

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fluxion_jax as fx
import pallas_kernels
from fluxion_jax.policy import modelled, one_sided, split_at
from tests.attention.helpers import filled, new_tokens, step

pytestmark = pytest.mark.gpu
LENGTHS = [1100, 400, 700]
SCALE = 0.125
SPLITS = {
    "host": one_sided("host"),
    "device": one_sided("device"),
    "half": split_at(0.5),
    "model": modelled(),
}


@functools.cache
def on_host(policy: str, summaries: str):
    return run(policy, summaries, "host", None)


def run(policy, summaries, split, kernel):
    cache = filled(LENGTHS, dtype="bfloat16", summaries=summaries)
    q, k, v = new_tokens(cache, 6)
    before = [x.unsafe_buffer_pointer() for x in cache.host_arrays]
    execution = fx.Execution(dense_below_tokens=0, device=kernel)
    out, cache, stats = step(execution, SCALE)(
        cache, q, k, v, fx.parse_policy(policy), SPLITS[split]
    )
    cache.check()
    assert [x.unsafe_buffer_pointer() for x in cache.host_arrays] == before
    read = stats.host_blocks + stats.device_blocks
    return np.asarray(out), np.asarray(stats.selection), np.asarray(read)


@pytest.mark.parametrize("summaries", ["host", "device"])
@pytest.mark.parametrize(
    ("split", "kernel"),
    [("half", "triton"), ("device", "triton"), ("model", "triton"), ("half", "mosaic")],
)
def test_splits_kernels_and_places_agree(summaries, split, kernel):
    for policy in ("fixed:16:0.05", "fixed:32:0.1:group", "full"):
        want = on_host(policy, "host")
        got = run(policy, summaries, split, kernel)
        np.testing.assert_allclose(got[0], want[0], atol=2e-5)
        np.testing.assert_array_equal(got[1], want[1])
        np.testing.assert_array_equal(got[2], want[2])


@pytest.mark.parametrize("kernel", ["triton", "mosaic"])
def test_kernels_see_what_steps_have_written(kernel):
    """A block that leaves the window must be seen, though kernels read its place before."""
    execution = fx.Execution(dense_below_tokens=0, device=kernel)
    compiled = step(execution, SCALE)
    caches = {name: filled([340], dtype="bfloat16") for name in ("host", "device")}
    for _ in range(40):
        outputs = {}
        for name, cache in caches.items():
            q, k, v = new_tokens(cache, 6)
            outputs[name], caches[name], _ = compiled(cache, q, k, v, fx.full(), SPLITS[name])
        np.testing.assert_allclose(outputs["device"], outputs["host"], atol=2e-5)


@pytest.mark.parametrize("summaries", ["host", "device"])
def test_two_programs_at_once_do_not_meet(summaries):
    """Threads with caches of their own, whose steps mix on the one stream of the device."""
    compiled = step(fx.Execution(dense_below_tokens=0), SCALE)
    policy, split = fx.parse_policy("fixed:16:0.05"), SPLITS["half"]

    def decode(length):
        cache = filled([length], dtype="bfloat16", summaries=summaries)
        outputs = []
        for _ in range(20):
            q, k, v = new_tokens(cache, 6)
            out, cache, _ = compiled(cache, q, k, v, policy, split)
            outputs.append(np.asarray(out))
        cache.check()
        return outputs

    lengths = [1100, 700, 900]
    alone = [decode(length) for length in lengths]
    with concurrent.futures.ThreadPoolExecutor(len(lengths)) as threads:
        together = list(threads.map(decode, lengths))
    for got, want in zip(together, alone, strict=True):
        np.testing.assert_array_equal(got, want)


def test_two_thousand_steps_compile_once():
    compiled = step(fx.Execution(dense_below_tokens=0), SCALE, False)
    cache = filled([1100], dtype="bfloat16")
    lengths = cache.lengths
    q, k, v = map(jnp.asarray, new_tokens(cache, 6))
    programs = None
    for i in range(2000):
        policy = fx.fixed(16 << (i % 4), 0.05)
        cache = cache.replace(lengths=jnp.copy(lengths))
        _, cache, _ = compiled(cache, q, k, v, policy, split_at((i % 5) / 4))
        programs = compiled.compilations() if i == 0 else programs
    cache.check()
    assert compiled.compilations() == programs


def test_scores_of_pinned_summaries_equal_those_of_a_copy():
    summaries = filled(LENGTHS).summaries[0]
    q8 = jnp.asarray(np.random.default_rng(0).integers(-127, 128, (3, 6, 64)), jnp.int8)
    arguments = (jnp.full((3, 2), 32), jnp.asarray([48, 5, 23]))
    score = jax.jit(pallas_kernels.score_units)
    copy = jnp.asarray(np.asarray(summaries))
    np.testing.assert_array_equal(score(q8, summaries, *arguments), score(q8, copy, *arguments))
