"""Edges of the cache and of a step: unusual windows, tiny capacities, exhausted capacities, NaN.

Every program here is tiny, because most tests are about one unusual number.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fluxion_jax as fx
import host_ops
from fluxion_jax.chunk_attention import prefill_attention
from fluxion_jax.policy import parse_policy, parse_split, split_at
from fluxion_jax.reference import full_attention

SCALE = 0.3
KV_HEADS, HEADS, HEAD_DIM = 2, 6, 8
SPLITS = ("host", "device", 0.0, 0.4, 1.0)


def layout(**options: Any) -> fx.KVLayout:
    return fx.KVLayout(1, KV_HEADS, HEAD_DIM, "float32", **options)


def test_a_fresh_cache_is_spread_over_the_memory_nodes(monkeypatch):
    spread: list[int] = []
    monkeypatch.setattr(host_ops, "spread", lambda x: spread.append(x.unsafe_buffer_pointer()))
    cache = fx.HostKV.allocate(layout(), 1, 640)
    assert spread == [x.unsafe_buffer_pointer() for x in (*cache.k, *cache.v, *cache.summaries)]


def drawn(tokens: int, batch: int = 1, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Queries `[B, S, N, H]`, keys and values `[B, S, K, H]`."""
    rng = np.random.default_rng(seed)
    shapes = [(batch, tokens, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


def execution(**options: Any) -> fx.Execution:
    return fx.Execution(**{"dense_below_tokens": 0, **options})


@functools.cache
def decode(chosen: fx.Execution, return_selection: bool = False) -> Any:
    @fx.jit
    def run(cache, q, k, v, policy, split):
        out, cache, stats = fx.decode_attention(
            q,
            k,
            v,
            cache,
            0,
            policy,
            scale=SCALE,
            split=split,
            execution=chosen,
            return_selection=return_selection,
        )
        return out, cache.advance(), stats

    return run


@fx.jit
def prefill(cache, q, k, v, count):
    out, cache = prefill_attention(q, k, v, count, cache, 0, scale=SCALE)
    return out, cache.advance(count)


def dense(q: np.ndarray, k: np.ndarray, v: np.ndarray, length: int) -> np.ndarray:
    """Attention of the query behind `length` tokens, itself included: `[B, N, H]`."""
    keys, values = (np.swapaxes(x[:, : length + 1], 1, 2) for x in (k, v))
    return full_attention(q[:, length], keys, values, [length + 1] * len(q), scale=SCALE)[0]


def walk(cache: fx.HostKV, tokens: int, first: int, policy: Any, split: Any, chosen: Any) -> None:
    """Prefills `first` tokens, decodes up to `tokens`, and compares every step with `dense`."""
    q, k, v = drawn(tokens, cache.batch)
    if first:
        count = jnp.full((cache.batch,), first, jnp.int32)
        _, cache = prefill(cache, q[:, :first], k[:, :first], v[:, :first], count)
    for n in range(first, tokens):
        out, cache, _ = decode(chosen)(cache, q[:, n], k[:, n], v[:, n], policy, split)
        np.testing.assert_allclose(out, dense(q, k, v, n), atol=2e-5, err_msg=f"step {n}")
    assert np.asarray(cache.lengths).tolist() == [tokens] * cache.batch
    cache.check()


@pytest.mark.parametrize("summaries", ["host", "device"])
@pytest.mark.parametrize(
    ("sinks", "recent"), [(0, 16), (16, 16), (0, 256), (64, 16), (32, 48)], ids=str
)
def test_other_windows_equal_full_attention_until_the_cache_is_full(sinks, recent, summaries):
    window = layout(sink_tokens=sinks, recent_tokens=recent, summaries=summaries)
    tokens = sinks + recent + 40
    for split in (parse_split("host"), split_at(0.4)):
        cache = fx.HostKV.allocate(window, 1, tokens)
        walk(cache, tokens, sinks + recent - 20, fx.full(), split, execution())


@pytest.mark.parametrize("max_tokens", [1, 2, 63, 64, 65, 335])
@pytest.mark.parametrize("measure", [False, True])
def test_a_cache_without_host_blocks_works_on_every_path(max_tokens, measure):
    for split in map(parse_split, ("host", "device", 0.4)):
        cache = fx.HostKV.allocate(layout(), 1, max_tokens)
        assert cache.num_host_blocks == 0
        policy = parse_policy("fixed:16:0.05")
        walk(cache, max_tokens, max(0, max_tokens - 2), policy, split, execution(measure=measure))


def test_a_cache_may_be_forked_and_reset_without_host_blocks():
    cache = fx.HostKV.allocate(layout(), 2, 40)
    fork = cache.fork([1, 1, 0])
    assert fork.batch == 3
    fork.check()
    assert np.asarray(cache.reset([1]).lengths).tolist() == [0, 0]


def test_a_fork_keeps_what_is_active():
    cache = filled(2).replace(active=jnp.asarray([True, False]))
    assert np.asarray(cache.fork([1, 0, 1]).active).tolist() == [False, True, False]


def filled(batch: int = 1, length: int = 500, max_tokens: int = 600, **options: Any) -> fx.HostKV:
    _, k, v = drawn(length, batch)
    return fx.HostKV.from_arrays(layout(**options), [k], [v], [length] * batch, max_tokens)


def one_step(cache: fx.HostKV, policy: Any, split: Any = "host", **options: Any) -> Any:
    q, k, v = (x[:, 0] for x in drawn(1, cache.batch, seed=9))
    select = options.pop("return_selection", False)
    run = decode(execution(**options), select)
    return run(cache, q, k, v, policy, parse_split(split))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forced:
    """The same granularity and budget for every head, whatever they are."""

    granularity: Any
    budget_tokens: Any

    def plan(self, features: Any, lengths: jax.Array) -> fx.Plan:
        del lengths
        batch, heads, _ = features.q.shape
        groups = (batch, features.num_kv_heads)
        return fx.Plan(
            jnp.full(groups, self.granularity, jnp.int32),
            jnp.full((batch, heads), self.budget_tokens, jnp.int32),
            jnp.zeros(groups, bool),
        )


@pytest.mark.parametrize("granularity", [16, 32, 64, 128])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_the_largest_budget_reads_everything_once(granularity, split):
    _, _, stats = one_step(filled(), Forced(granularity, np.iinfo(np.int32).max), split)
    read = np.asarray(stats.host_blocks + stats.device_blocks)
    assert read.tolist() == [[11] * KV_HEADS]


@pytest.mark.parametrize("granularity", [32, 128])
def test_a_split_inside_a_unit_changes_nothing(granularity):
    results = []
    for share in (0.0, 0.13, 0.5, 0.77, 1.0):
        cache = filled(length=1100, max_tokens=1200)
        policy = Forced(granularity, 200)
        out, _, stats = one_step(cache, policy, share, return_selection=True)
        results.append((out, stats))
    for out, stats in results:
        np.testing.assert_allclose(out, results[0][0], atol=1e-5)
        np.testing.assert_array_equal(stats.selection, results[0][1].selection)
        read = stats.host_blocks + stats.device_blocks
        np.testing.assert_array_equal(read, results[0][1].host_blocks + results[0][1].device_blocks)


def test_at_most_one_task_lies_on_both_sides():
    for seed in range(100):
        rng = np.random.default_rng(seed)
        blocks = rng.integers(0, 500, 3).astype(np.int32)
        wanted = np.minimum(
            rng.integers(0, 500, (3, 5)) * (rng.random((3, 5)) > 0.3), blocks[:, None]
        )
        boundary = split_at(rng.random()).boundaries(
            jnp.asarray(blocks), jnp.asarray(wanted, jnp.int32), 8192
        )
        boundary = np.asarray(boundary)
        assert ((boundary >= 0) & (boundary <= blocks[:, None])).all()
        assert ((boundary > 0) & (boundary < blocks[:, None])).sum() <= 1


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_a_budget_of_nothing_costs_nothing(split):
    _, _, stats = one_step(filled(), Forced(16, 0), split)
    assert not np.asarray(stats.host_blocks).any()
    assert not np.asarray(stats.host_units).any()
    assert not np.asarray(stats.device_blocks).any()


@pytest.mark.parametrize("max_tokens", [100, 350])
def test_a_full_cache_says_so(max_tokens):
    cache = fx.HostKV.allocate(layout(), 1, max_tokens)
    q, k, v = drawn(max_tokens)
    count = jnp.full((1,), max_tokens, jnp.int32)
    _, cache = prefill(cache, q, k, v, count)
    _, cache, _ = one_step(cache, fx.full())
    with pytest.raises(fx.FluxionError, match="max_tokens"):
        cache.check()


def test_recall_of_the_active_rows_survives_an_inactive_one():
    cache = filled(2).replace(active=jnp.asarray([True, False]))
    _, _, stats = one_step(cache, fx.full(), measure=True)
    assert np.isfinite(np.asarray(stats.recall)).all()


def test_more_query_heads_to_a_group_than_the_native_library_takes_are_refused_by_name():
    cache = fx.HostKV.allocate(fx.KVLayout(1, 1, 8, "float32"), 1, 400)
    q, new = np.ones((1, 65, 8), np.float32), np.ones((1, 1, 8), np.float32)
    with pytest.raises(fx.UnsupportedError, match="at most 64 query heads per KV head, got 65"):
        decode(execution())(cache, q, new, new, fx.full(), parse_split("host"))
    cache.check()


def test_a_nan_that_did_not_count_reaches_no_later_prefill():
    cache = filled()
    q, k, v = drawn(1, seed=3)
    bad = np.full_like(k[:, 0], np.nan)
    _, cache, _ = one_step_with(cache, q[:, 0], bad)
    cache = cache.replace(lengths=cache.lengths - 1)  # What a step that failed leaves behind.
    out, _ = prefill(cache, q, k, v, jnp.ones((1,), jnp.int32))
    assert np.isfinite(np.asarray(out)).all()


def test_padding_of_a_chunk_reaches_no_token():
    q, k, v = drawn(8)
    v[:, 5:] = np.nan
    cache = fx.HostKV.allocate(layout(), 1, 40)
    out, _ = prefill(cache, q, k, v, jnp.full((1,), 5, jnp.int32))
    assert np.isfinite(np.asarray(out)[:, :5]).all()


def test_what_float16_cannot_hold_surfaces_in_every_head_that_reads_it():
    q, k, v = drawn(501)
    v[0, 200, 0, 3] = 1e5
    k[0, 200, 1, 3] = -1e5
    q[..., 3] = -np.abs(q[..., 3])
    half = dataclasses.replace(layout(), dtype="float16")
    cache = fx.HostKV.allocate(half, 1, 600)
    count = jnp.full((1,), 500, jnp.int32)
    out, cache = prefill(cache, q[:, :500], k[:, :500], v[:, :500], count)
    finite = np.isfinite(np.asarray(out)[0]).all(axis=-1)
    assert not finite[200:].any()
    assert np.asarray(cache.exponents).max() < 0
    for split in ("host", "device"):
        last = (x[:, 500] for x in (q, k, v))
        out, _, _ = decode(execution())(cache.fork(), *last, fx.full(), parse_split(split))
        assert not np.isfinite(np.asarray(out)).all(axis=-1).any()


def test_prefill_in_bfloat16_reads_all_bits_of_a_float16_cache():
    q, k, v = drawn(40)
    q = jnp.asarray(q, jnp.bfloat16)
    count = jnp.full((1,), 40, jnp.int32)
    half = dataclasses.replace(layout(), dtype="float16")
    got, want = (
        prefill(fx.HostKV.allocate(half, 1, 40), queries, k, v, count)[0]
        for queries in (q, q.astype(jnp.float32))
    )
    np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


def one_step_with(cache: fx.HostKV, q: np.ndarray, new: np.ndarray) -> Any:
    return decode(execution())(cache, q, new, new, fx.full(), parse_split("host"))


def test_prefill_leaves_an_inactive_row_alone():
    cache = filled(2).replace(active=jnp.asarray([True, False]))
    before = np.array(cache.window_k[0][1])
    q, k, v = drawn(64, 2, seed=4)
    _, cache = prefill(cache, q, k, v, jnp.full((2,), 64, jnp.int32))
    assert np.asarray(cache.lengths).tolist() == [564, 500]
    np.testing.assert_array_equal(cache.window_k[0][1], before)


def test_a_mask_of_rows_is_not_taken_for_row_numbers():
    try:
        lengths = np.asarray(filled(2).reset([True, False]).lengths).tolist()
    except fx.ConfigError:
        return
    assert lengths == [0, 500]


@pytest.mark.parametrize("split", ["host", "device"])
@pytest.mark.parametrize("granularity", [8, 48])
def test_a_policy_with_a_granularity_that_does_not_exist_is_named(granularity, split):
    _, cache, _ = one_step(filled(), Forced(granularity, 100), split)
    with pytest.raises(fx.FluxionError, match="granularity"):
        cache.check()


def test_such_a_granularity_is_named_without_host_blocks_too():
    cache = fx.HostKV.allocate(layout(), 1, 40)
    _, cache, stats = one_step(cache, Forced(48, 100))
    assert np.asarray(stats.granularity).tolist() == [[16] * KV_HEADS]
    with pytest.raises(fx.FluxionError, match="granularity"):
        cache.check()


def test_a_policy_that_is_no_pytree_gives_a_readable_error():
    class Plain:
        def plan(self, features, lengths):
            return fx.full().plan(features, lengths)

    with pytest.raises(fx.ConfigError, match="pytree"):
        one_step(filled(), Plain())


def test_the_log_sum_exps_are_there_without_host_blocks_too():
    cache = fx.HostKV.allocate(layout(), 1, 40)
    _, _, stats = one_step(cache, parse_policy("fixed:64:0.05"), return_selection=True)
    assert stats.lse is not None
    assert np.asarray(stats.granularity).tolist() == [[64] * KV_HEADS]


def test_jit_refuses_arguments_without_names_and_unknown_names():
    with pytest.raises(fx.ConfigError, match=r"arguments all have names, got \*rest in run"):

        @fx.jit
        def run(cache, *rest):
            return cache.advance(rest[0])

    with pytest.raises(fx.ConfigError, match=r"got \['flga'\]"):
        fx.jit(lambda cache, flag: cache, static_argnames=("flga",))
