"""One decode step against float64 attention that shares no code with it."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fluxion_jax as fx
import host_ops
from fluxion_jax.policy import Plan, split_at
from tests.attention.helpers import (
    filled,
    head_major,
    new_tokens,
    selected_blocks,
    step,
    tokens,
)

SCALE = 0.11
SPLITS = (0.0, 0.5, 1.0)
# Below the sinks, in the window, on its edges, one block out, ragged, beyond 1,024 tokens.
LENGTHS = [1100, 40, 0, 319, 336, 577]
IMPLEMENTATIONS = [pytest.param("native", marks=pytest.mark.native), "xla"]


def dense(q, lengths, kv_heads, head_dim, keep=None):
    """Attention over the tokens that `keep(row, head)` allows, float64, token by token."""
    k, v = (head_major(x).astype(np.float64) for x in tokens(len(lengths), kv_heads, head_dim))
    batch, heads, _ = q.shape
    out, lse = np.zeros(q.shape), np.zeros((batch, heads))
    for row in range(batch):
        for head in range(heads):
            kv = head // (heads // kv_heads)
            index = np.arange(lengths[row] + 1)
            if keep is not None:
                index = index[keep(row, head)[: len(index)]]
            scores = SCALE * (k[row, kv, index] @ q[row, head].astype(np.float64))
            peak = scores.max()
            weights = np.exp(scores - peak)
            out[row, head] = weights @ v[row, kv, index] / weights.sum()
            lse[row, head] = peak + np.log(weights.sum())
    return out, lse


BEST = "native" if host_ops.available()["native"] is None else "xla"


def run(cache, q, k, v, policy, split, implementation=BEST, **options):
    execution = fx.Execution(host=implementation, dense_below_tokens=0, **options)
    return step(execution, SCALE)(cache, q, k, v, policy, split)


def test_names_of_device_kernels_concern_the_blocks_alone():
    cache = filled(LENGTHS)
    q, k, v = new_tokens(cache, 6)
    want, _ = dense(q, LENGTHS, 2, 64)
    out, _, _ = run(cache, q, k, v, fx.full(), split_at(0.5), device=("triton", "xla"))
    np.testing.assert_allclose(out, want, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("dtype", "summaries"),
    [
        *itertools.product(("float32", "bfloat16"), ("host", "device")),
        ("float16", "host"),
    ],
)
def test_full_budget_equals_full_attention(implementation, summaries, dtype):
    # Half precision is only stored: keys and values are exact in it here (but for float16's
    # subnormals, by 3e-8) and all arithmetic is float32, so the tolerance is that of float32.
    tolerance = 1e-5
    for share in SPLITS:
        cache = filled(LENGTHS, dtype=dtype, summaries=summaries)
        q, k, v = new_tokens(cache, 6)
        want, _ = dense(q, LENGTHS, 2, 64)
        out, cache, stats = run(cache, q, k, v, fx.full(), split_at(share), implementation)
        for row in range(len(LENGTHS)):
            np.testing.assert_allclose(out[row], want[row], atol=tolerance, err_msg=f"row {row}")
        assert np.asarray(cache.lengths).tolist() == [n + 1 for n in LENGTHS]
        assert int(cache.status[0]) == 0
        read = np.asarray(stats.host_blocks + stats.device_blocks)
        assert read.tolist() == [[max(0, n - 320) // 16] * 2 for n in LENGTHS]


@pytest.mark.parametrize("policy", ["fixed:16:0.05", "fixed:32:0.1:group", "fixed:128:0.02"])
def test_splits_placements_and_implementations_agree(policy):
    """The same bits are selected everywhere; outputs differ by float32 rounding at most."""
    reference = None
    for implementation in {BEST, "xla"}:
        for summaries in ("host", "device"):
            for share in SPLITS:
                cache = filled(LENGTHS, summaries=summaries)
                q, k, v = new_tokens(cache, 6)
                out, cache, stats = run(
                    cache, q, k, v, fx.parse_policy(policy), split_at(share), implementation
                )
                got = np.asarray(out), np.asarray(stats.selection)
                if reference is None:
                    reference = got
                np.testing.assert_allclose(got[0], reference[0], atol=2e-6)
                np.testing.assert_array_equal(got[1], reference[1])


@pytest.mark.parametrize("group", [1, 3, 4, 7, 8])
def test_a_head_attends_to_its_own_blocks_and_the_window(group):
    cache = filled(LENGTHS)
    q, k, v = new_tokens(cache, 2 * group)
    out, _, stats = run(cache, q, k, v, fx.fixed(32, 0.1), split_at(0.5))

    def keep(row, head):
        n = LENGTHS[row]
        on_host = 16 * max(0, (n - 320) // 16)
        kept = np.ones(1200, bool)
        kept[64 : 64 + on_host] = False
        for block in selected_blocks(stats.selection, row, head):
            assert 16 * block < on_host
            kept[64 + 16 * block : 80 + 16 * block] = True
        return kept

    want, want_lse = dense(q, LENGTHS, 2, 64, keep)
    np.testing.assert_allclose(out, want, atol=1e-5)
    lse = np.logaddexp.reduce(np.asarray(stats.lse, np.float64), axis=0)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)


def test_the_budget_is_a_share_of_the_whole_length_rounded_up_to_units():
    cache = filled(LENGTHS)
    q, k, v = new_tokens(cache, 6)
    _, _, stats = run(cache, q, k, v, fx.fixed(32, 0.1), split_at(1.0))
    for row, n in enumerate(LENGTHS):
        on_host = max(0, (n - 320) // 16)
        units = -(-on_host // 2)
        wanted = min(units, -(-int(np.ceil(0.1 * (n + 1))) // 32))
        for head in range(6):
            chosen = {block // 2 for block in selected_blocks(stats.selection, row, head)}
            assert len(chosen) == wanted


def test_the_chosen_units_have_the_highest_upper_bounds():
    """Scored in float64 on float bounds: what was left out never beats what was taken by much."""
    cache = filled(LENGTHS)
    q, k, v = new_tokens(cache, 6)
    _, _, stats = run(cache, q, k, v, fx.fixed(16, 0.1), split_at(1.0))
    keys = head_major(tokens(len(LENGTHS), 2, 64)[0]).astype(np.float64)
    row, blocks = 0, (1100 - 320) // 16
    for head in range(6):
        units = keys[row, head // 3, 64 : 64 + 16 * blocks].reshape(blocks, 16, 64)
        query = q[row, head].astype(np.float64)
        bound = np.maximum(query * units.min(axis=1), query * units.max(axis=1)).sum(axis=1)
        chosen = np.zeros(blocks, bool)
        chosen[selected_blocks(stats.selection, row, head)] = True
        # Quantising to int8 moves a bound by well under 2 % here.
        assert bound[~chosen].max() <= bound[chosen].min() * 1.02
        assert bound[chosen].mean() > bound[~chosen].mean()


def test_group_variant_takes_one_set_per_group():
    cache = filled(LENGTHS)
    q, k, v = new_tokens(cache, 6)
    _, _, stats = run(cache, q, k, v, fx.fixed(16, 0.05, per_group=True), split_at(0.5))
    selection = np.asarray(stats.selection)
    for first in (0, 3):
        np.testing.assert_array_equal(selection[:, first], selection[:, first + 1])
        np.testing.assert_array_equal(selection[:, first], selection[:, first + 2])
    assert (selection[0, 0] != selection[0, 3]).any()


@jax.tree_util.register_static
class PerHead:
    """A policy of different granularities per group and budgets per head, one of them zero."""

    def plan(self, features, lengths):
        batch, heads, _ = features.q.shape
        granularity = jnp.broadcast_to(jnp.asarray([16, 128], jnp.int32), (batch, 2))
        budget = jnp.broadcast_to(jnp.asarray([0, 20, 200, 0, 0, 0], jnp.int32), (batch, heads))
        return Plan(granularity, budget, jnp.zeros((batch, 2), bool))


@pytest.mark.parametrize("share", SPLITS)
def test_streaming_heads_have_no_host_work(share):
    cache = filled([1100, 900])
    q, k, v = new_tokens(cache, 6)
    out, _, stats = run(cache, q, k, v, PerHead(), split_at(share))
    counts = [len(selected_blocks(stats.selection, 0, head)) for head in range(6)]
    assert counts == [0, 2, 13, 0, 0, 0]
    assert np.asarray(stats.host_blocks + stats.device_blocks)[:, 1].tolist() == [0, 0]
    window_only, _ = dense(q, [1100, 900], 2, 64, lambda row, _: _window_only([1100, 900][row]))
    np.testing.assert_allclose(out[:, 3:], window_only[:, 3:], atol=1e-5)


def _window_only(n: int) -> np.ndarray:
    kept = np.ones(1200, bool)
    kept[64 : 64 + 16 * ((n - 320) // 16)] = False
    return kept


def test_short_sequences_are_read_whole():
    cache = filled([900, 1100])
    q, k, v = new_tokens(cache, 6)
    execution = fx.Execution(host=BEST, dense_below_tokens=1000)
    _, _, stats = step(execution, SCALE)(cache, q, k, v, fx.fixed(16, 0.02), split_at(1.0))
    read = np.asarray(stats.host_blocks)
    assert read[0].tolist() == [36, 36]
    assert (read[1] < 36).all()


def test_inactive_rows_do_nothing():
    cache = filled(LENGTHS)
    cache = cache.replace(active=cache.active.at[0].set(False))
    before = [np.asarray(x).copy() for x in (cache.k[0][0], cache.window_k[0][0])]
    q, k, v = new_tokens(cache, 6)
    _, cache, stats = run(cache, q, k, v, fx.full(), split_at(0.5))
    assert np.asarray(cache.lengths).tolist() == [LENGTHS[0], *[n + 1 for n in LENGTHS[1:]]]
    assert (np.asarray(stats.host_blocks + stats.device_blocks)[0] == 0).all()
    for old, new in zip(before, (cache.k[0][0], cache.window_k[0][0]), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("host", IMPLEMENTATIONS)
def test_after_an_error_a_layer_writes_nothing_and_the_host_reads_nothing(host):
    # The third row's oldest block would leave the window.
    cache = filled([1100, 40, 335, 577])
    failed = cache.replace(status=jnp.full(1, host_ops.STATUS_TIMEOUT, jnp.int32))
    kept = ("lengths", "exponents", "window_k", "window_v", "k", "v", "summaries", "status")
    before = [np.array(x) for name in kept for x in jax.tree.leaves(getattr(failed, name))]
    q, k, v = new_tokens(cache, 6)
    _, failed, stats = run(failed, q, k, v, fx.fixed(16, 0.3), split_at(0.5), host)
    assert not np.asarray(stats.host_blocks).any()
    assert not np.asarray(stats.host_units).any()
    after = [x for name in kept for x in jax.tree.leaves(getattr(failed, name))]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.native
def test_the_same_bits_for_one_and_two_threads():
    from host_ops import native

    outputs = []
    threads = native.info()["threads"]
    try:
        for count in (1, 2):
            native.set_threads(count)
            for _ in range(3):
                cache = filled(LENGTHS)
                q, k, v = new_tokens(cache, 6)
                out, cache, stats = run(cache, q, k, v, fx.fixed(16, 0.3), split_at(0.5), "native")
                outputs.append((np.asarray(out).tobytes(), np.asarray(stats.selection).tobytes()))
    finally:
        native.set_threads(threads)
    assert len(set(outputs)) == 1


@pytest.mark.parametrize("share", SPLITS)
def test_nan_surfaces_only_where_it_is_read(share):
    cache = filled([1100])
    q, k, v = new_tokens(cache, 6)
    _, _, stats = run(cache.fork(), q, k, v, fx.fixed(16, 0.3), split_at(share))
    chosen = [set(selected_blocks(stats.selection, 0, head)) for head in range(3)]
    block = min(chosen[0] - chosen[1])
    broken = np.asarray(cache.v[0]).copy()
    # Its keys are as they were, so the same heads choose the block again.
    broken[0, 0, block] = np.nan
    cache = cache.replace(v=(jax.device_put(broken, cache.v[0].sharding, may_alias=False),))
    out, _, stats = run(cache, q, k, v, fx.fixed(16, 0.3), split_at(share))
    reads = [block in selected_blocks(stats.selection, 0, head) for head in range(3)]
    assert reads == [block in c for c in chosen]
    assert [bool(np.isnan(out[0, head]).any()) for head in range(3)] == reads
    assert not np.isnan(out[0, 3:]).any()


def test_measured_recall_and_error_are_what_they_say():
    cache = filled(LENGTHS)
    q, k, v = new_tokens(cache, 6)
    out, cache, stats = run(cache, q, k, v, fx.fixed(16, 0.1), split_at(1.0), measure=True)
    exact, exact_lse = dense(q, LENGTHS, 2, 64)
    lse = np.logaddexp.reduce(np.asarray(stats.lse, np.float64), axis=0)
    np.testing.assert_allclose(stats.recall, np.exp(lse - exact_lse), atol=1e-5)
    largest = np.linalg.norm(exact, axis=-1).max(axis=-1, keepdims=True)
    error = np.linalg.norm(np.asarray(out) - exact, axis=-1) / largest
    np.testing.assert_allclose(stats.output_error, error, atol=1e-5)
    assert 0.1 < float(stats.recall[0].mean()) < 0.99
    assert int(cache.status[0]) == 0


def test_wrong_shapes_are_refused_with_both_shapes():
    cache = filled([500])
    q, k, v = new_tokens(cache, 6)
    with pytest.raises(fx.ConfigError, match=r"k_new of shape \[B, K, H\] = \(1, 2, 64\), got"):
        run(cache, q, k[:, :1], v, fx.full(), split_at(1.0))
    with pytest.raises(fx.ConfigError, match="multiple of 2 query heads"):
        run(cache, q[:, :5], k, v, fx.full(), split_at(1.0))
    with pytest.raises(fx.ConfigError, match=r"q of shape \[B, N, H\]"):
        run(cache, q[..., :32], k, v, fx.full(), split_at(1.0))
