"""Decode steps inside compiled programs of every kind: in place, compiled once, or refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fluxion_jax as fx
import host_ops
from fluxion_jax.policy import split_at
from tests.attention.helpers import filled, new_tokens
from tests.hlo import full_size_copies

SCALE = 0.11
IMPLEMENTATIONS = [pytest.param("native", marks=pytest.mark.native), "xla"]
BEST = "native" if host_ops.available()["native"] is None else "xla"


def one_step(cache, q, k, v, split, implementation=BEST):
    """A step of a model of one layer; the next query depends on the output, as in a model."""
    out, cache, _ = fx.decode_attention(
        q,
        k,
        v,
        cache,
        0,
        fx.fixed(16, 0.2),
        scale=SCALE,
        split=split,
        execution=fx.Execution(host=implementation, dense_below_tokens=0),
    )
    return out, cache.advance()


def pointers(cache) -> list[int]:
    host = [cache.k[0], cache.v[0]]
    if cache.layout.summaries == "host":
        host.append(cache.summaries[0])
    assert all(x.sharding.memory_kind == "pinned_host" for x in host)
    return [x.unsafe_buffer_pointer() for x in host]


def host_shapes(cache) -> list[tuple[int, ...]]:
    shapes = [cache.k[0].shape]
    if cache.layout.summaries == "host":
        shapes.append(cache.summaries[0].shape)
    return shapes


@pytest.fixture
def inputs():
    """A cache whose next step flushes a block, and the step's arrays."""
    cache = filled([1000, 335])
    return cache, *map(jnp.asarray, new_tokens(cache, 6))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("summaries", ["host", "device"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_keeps_pointers_and_copies_nothing(implementation, summaries, dtype):
    cache = filled([1000, 335], dtype=dtype, summaries=summaries)
    q, k, v = map(jnp.asarray, new_tokens(cache, 6))

    def run(cache, q, k, v, split):
        return one_step(cache, q, k, v, split, implementation)

    compiled = (
        jax.jit(
            run,
            donate_argnums=0,
            out_shardings=(None, fx.cache_shardings(cache)),
        )
        .lower(cache, q, k, v, split_at(0.5))
        .compile()
    )
    assert full_size_copies(compiled.as_text(), host_shapes(cache)) == []
    before = pointers(cache)
    for _ in range(3):
        out, cache = compiled(cache, q, k, v, split_at(0.5))
    cache.check()
    assert pointers(cache) == before
    assert np.isfinite(np.asarray(out)).all()


def test_scan_and_while_loop_equal_single_steps(inputs):
    cache, q, k, v = inputs
    steps = 20

    @fx.jit
    def single(cache, q, split):
        return one_step(cache, q, k, v, split)

    @fx.jit
    def scanned(cache, q, split):
        def body(carry, _):
            out, cache = one_step(carry[1], carry[0], k, v, split)
            return (out, cache), None

        (out, cache), _ = jax.lax.scan(body, (q, cache), length=steps)
        return out, cache

    @fx.jit
    def looped(cache, q, split):
        def body(carry):
            i, q, cache = carry
            return i + 1, *one_step(cache, q, k, v, split)

        _, out, cache = jax.lax.while_loop(lambda c: c[0] < steps, body, (0, q, cache))
        return out, cache

    results = []
    for program in (single, scanned, looped):
        fork, out = cache.fork(), q
        before = pointers(fork)
        for _ in range(steps if program is single else 1):
            out, fork = program(fork, out, split_at(1.0))
        fork.check()
        assert pointers(fork) == before
        results.append((np.asarray(out), np.asarray(fork.lengths), np.asarray(fork.k[0])))
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(got, want)


def test_nnx_jit_with_donation_is_in_place(inputs):
    cache, q, k, v = inputs

    class Holder(nnx.Module):
        def __init__(self):
            self.gain = nnx.Param(jnp.ones(()))

    def run(cache, model, q):
        return one_step(cache, q * model.gain[...], k, v, split_at(1.0))

    program = nnx.jit(run, donate_argnums=0, out_shardings=(None, fx.cache_shardings(cache)))
    before = pointers(cache)
    for _ in range(3):
        _, cache = program(cache, Holder(), q)
    cache.check()
    assert pointers(cache) == before


def test_plain_jit_without_donation_ends_in_an_error_that_names_the_fix(inputs):
    cache, q, k, v = inputs
    lengths = np.asarray(cache.lengths)
    _, copied = jax.jit(one_step)(cache, q, k, v, split_at(1.0))
    with pytest.raises(fx.FluxionError, match=r"use fluxion_jax\.jit instead of jax\.jit"):
        copied.check()
    # Nothing is lost: the copy has the token, and the caller's cache was not consumed.
    np.testing.assert_array_equal(copied.lengths, lengths + 1)
    _, cache = fx.jit(one_step)(cache, q, k, v, split_at(1.0))
    cache.check()
    np.testing.assert_array_equal(cache.lengths, lengths + 1)


def test_a_call_outside_of_any_program_compiles_itself(inputs):
    cache, q, k, v = inputs
    want, _ = fx.jit(one_step)(cache.fork(), q, k, v, split_at(1.0))
    before = pointers(cache)
    out, cache = one_step(cache, q, k, v, split_at(1.0))
    np.testing.assert_array_equal(out, want)
    assert pointers(cache) == before


def test_what_changes_from_step_to_step_does_not_recompile(inputs):
    cache, q, k, v = inputs

    @fx.jit
    def run(cache, q, k, v, policy, split):
        out, cache, _ = fx.decode_attention(
            q, k, v, cache, 0, policy, scale=SCALE, split=split, execution=fx.Execution(host=BEST)
        )
        return out, cache.advance()

    policies = ("full", "fixed:16:0.05", "fixed:128:0.5:group", "fixed:32:0.02")
    for share in (0.0, 0.3, 1.0):
        for policy in policies:
            _, cache = run(cache, q, k, v, fx.parse_policy(policy), split_at(share))
    cache = cache.reset([1]).replace(active=jnp.asarray([True, False]))
    _, cache = run(cache, q, k, v, fx.full(), split_at(0.5))
    cache.check()
    assert run.compilations() == 1


@pytest.mark.native
def test_two_threads_with_two_caches_share_one_program():
    from concurrent.futures import ThreadPoolExecutor

    @fx.jit
    def run(cache, q, k, v, split):
        return one_step(cache, q, k, v, split, "native")

    def generate(seed):
        cache = filled([1000, 335])
        q, k, v = map(jnp.asarray, new_tokens(cache, 6, seed))
        out = q
        for _ in range(40):
            out, cache = run(cache, out, k, v, split_at(1.0))
        cache.check()
        return np.asarray(out).tobytes()

    alone = [generate(seed) for seed in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(generate, (1, 2)))
    assert together == alone
