from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fluxion_jax as fx
import host_ops
from fluxion_jax.decode import LayerTotals
from fluxion_jax.policy import split_at
from fluxion_jax.stats import DecodeStats
from tests.generation import tiny

LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 64
BLOCK_BYTES = 2 * 16 * HEAD_DIM * 4
UNIT_BYTES = 2 * HEAD_DIM
STEPS = 40
# Host blocks of each row before each step of a generation behind `tiny.LENGTHS`.
BLOCKS = np.asarray([[max(0, (n - 1 + i - 320) // 16) for n in tiny.LENGTHS] for i in range(STEPS)])
COUNTED = BLOCKS.sum() * KV_HEADS * LAYERS


def run(policy, **options):
    rows = tiny.prompts()
    return tiny.generate(tiny.llama(), rows, max_new_tokens=STEPS, policy=policy, **options).stats


def test_full_reads_every_block_once():
    stats = run("full")
    assert stats.num_steps == STEPS
    assert stats.num_tokens == 3 * STEPS
    assert stats.prompt_tokens == sum(tiny.LENGTHS)
    assert stats.cached_blocks == BLOCKS.sum() * KV_HEADS
    np.testing.assert_array_equal(stats.host_blocks, [COUNTED // LAYERS] * LAYERS)
    units = -(-BLOCKS // 8).sum() * KV_HEADS * LAYERS
    assert int(stats.host_units.sum()) in (0, units)
    expected = COUNTED * BLOCK_BYTES + int(stats.host_units.sum()) * UNIT_BYTES
    assert stats.host_bytes == expected
    assert stats.host_bytes_per_token == expected / (3 * STEPS)
    assert stats.read_fraction == 1.0
    assert not stats.device_blocks.any()
    assert not stats.device_units.any()


@pytest.mark.parametrize(
    ("policy", "granularity", "fraction", "ranked"),
    [
        ("fixed:16:0.05", 16, 0.05, 3),
        ("fixed:16:0.05:group", 16, 0.05, 1),
        ("fixed:32:0.02:group", 32, 0.02, 1),
    ],
)
def test_a_fixed_budget_bounds_what_is_read(policy, granularity, fraction, ranked):
    stats = run(policy)
    lengths = np.asarray([[n + i for n in tiny.LENGTHS] for i in range(STEPS)])
    units = np.ceil(np.ceil(np.float32(fraction) * lengths.astype(np.float32)) / granularity)
    units = np.minimum(units.astype(int), -(-BLOCKS * 16 // granularity))
    most = np.minimum(units * (granularity // 16) * ranked, BLOCKS).sum() * KV_HEADS
    # The last unit may hold one block only.
    least = np.maximum((units - 1) * (granularity // 16) + (units > 0), 0).sum() * KV_HEADS
    for read in stats.host_blocks:
        assert least <= read <= most
    # Where the budget covers everything nothing is ranked, and so nothing is scored.
    whole = np.broadcast_to(-(-BLOCKS * 16 // granularity), units.shape)
    scored = np.where(units < whole, whole, 0).sum() * KV_HEADS
    np.testing.assert_array_equal(stats.host_units, [scored] * LAYERS)
    assert 0 < stats.read_fraction < 1
    assert stats.read_fraction == stats.host_blocks.sum() / COUNTED


def test_times_are_those_of_the_run():
    stats = run("full")
    assert stats.tokens_per_s > 0
    assert stats.prefill_s > 0
    assert 0 <= stats.compile_s < stats.decode_s


@pytest.mark.native
def test_the_host_reports_its_times():
    stats = run("full")
    assert 0 < stats.host_ms_per_step < 1e3 * stats.decode_s / STEPS
    assert stats.to_dict()["host_ms_per_step"] == stats.host_ms_per_step


def test_a_program_compiled_before_costs_no_compile_time():
    run("full")
    assert run("full").compile_s == 0.0


def test_what_was_not_measured_is_absent():
    stats = DecodeStats(layout=tiny.llama().config.kv_layout("float32"))
    assert np.isnan(stats.tokens_per_s)
    assert np.isnan(stats.host_ms_per_step)
    document = json.loads(json.dumps(stats.to_dict(), allow_nan=False))
    assert document["tokens_per_s"] is None
    assert document["host_ms_per_step"] is None
    assert document["recall"] is None
    assert document["output_error"] is None
    assert document["host_bytes_per_token"] == 0.0
    assert "tokens/s" not in str(stats)
    assert "nan" not in str(stats)


def test_a_report_is_json():
    stats = run("fixed:16:0.05")
    assert json.loads(stats.to_json()) == json.loads(json.dumps(stats.to_dict(), allow_nan=False))
    assert f"{stats.num_tokens} tokens in {STEPS} steps" in str(stats)


def test_summaries_on_the_device_are_not_host_bytes():
    layout = tiny.llama().config.kv_layout("float32", summaries="device")
    stats = DecodeStats(layout=layout)
    nothing = np.zeros(LAYERS)
    stats.add(
        LayerTotals(
            np.asarray([3, 0]), np.asarray([0, 4]), np.asarray([5, 5]), nothing, nothing,
            np.zeros((LAYERS, 4)), np.asarray(20), nothing + np.nan, nothing + np.nan,
        ),
        num_steps=2,
    )  # fmt: skip
    assert stats.host_bytes == 7 * BLOCK_BYTES
    assert stats.read_fraction == 7 / 40


def test_measures_are_means_over_all_steps():
    stats = DecodeStats(layout=tiny.llama().config.kv_layout("float32"))
    nothing = np.zeros(LAYERS, np.int64)
    for steps, recall in ((32, 0.5), (8, 1.0)):
        summed = np.full(LAYERS, recall * steps)
        totals = LayerTotals(
            nothing, nothing, nothing, nothing, nothing, np.zeros((LAYERS, 4)), 0, summed, summed
        )
        stats.add(totals, num_steps=steps)
    np.testing.assert_allclose(stats.recall, 0.6)


@pytest.mark.native
def test_a_step_that_failed_is_in_no_sum():
    rows = tiny.prompts()
    options = {"max_new_tokens": STEPS, "execution": fx.Execution(measure=True)}
    host_ops.inject_fault(host_ops.STATUS_INTERNAL, after_calls=10 * LAYERS + 1)
    try:
        with pytest.raises(fx.FluxionError) as failure:
            tiny.generate(tiny.llama(), rows, policy="full", **options)
    finally:
        host_ops.inject_fault(host_ops.STATUS_OK)
    stats = failure.value.partial.stats
    steps = stats.num_steps
    assert 0 < steps < STEPS
    np.testing.assert_allclose(stats.recall, 1.0, atol=1e-5)
    assert stats.cached_blocks == BLOCKS[:steps].sum() * KV_HEADS
    np.testing.assert_array_equal(stats.host_blocks, [stats.cached_blocks] * LAYERS)


def score(policy):
    cache = tiny.prefilled(tiny.llama(), tiny.prompts((9, 400, 590)))
    following = np.asarray(tiny.prompts((13, 13, 13), seed=2))
    execution = fx.Execution(dense_below_tokens=0, measure=True)
    return fx.score(
        tiny.llama(), cache, following, policy=policy, execution=execution, progress=False
    )


def test_full_attention_recalls_everything():
    scores = score("full")
    np.testing.assert_allclose(scores.stats.recall, 1.0, atol=1e-5)
    np.testing.assert_allclose(scores.stats.output_error, 0.0, atol=1e-5)
    assert scores.stats.read_fraction == 1.0


def test_sparse_attention_recalls_less_and_more_budget_recalls_more():
    small, large = score("fixed:16:0.02").stats, score("fixed:16:0.3").stats
    assert (small.recall < large.recall).all()
    assert (large.recall < 1).all()
    assert (small.recall > 0.3).all()
    assert (small.output_error > large.output_error).all()
    assert (large.output_error > 0).all()
    assert small.read_fraction < large.read_fraction
    full = score("full")
    assert full.stats.host_bytes_per_token > large.host_bytes_per_token


def numpy_attention(q, k, v, keep, scale):
    """Float64 attention of one head over kept tokens: output and log-sum-exp."""
    scores = (k[keep] @ q) * scale
    peak = scores.max()
    weights = np.exp(scores - peak)
    return weights @ v[keep] / weights.sum(), peak + np.log(weights.sum())


def test_recall_and_error_of_one_step_follow_from_the_selection():
    batch, kv_heads, group, size, tokens = 2, 2, 3, 16, 600
    lengths = np.asarray([600, 437])
    rng = np.random.default_rng(5)
    k, v = rng.normal(size=(2, batch, tokens, kv_heads, size)).astype(np.float32)
    q = 2 * rng.normal(size=(batch, kv_heads * group, size)).astype(np.float32)
    new_k, new_v = rng.normal(size=(2, batch, kv_heads, size)).astype(np.float32)
    layout = fx.KVLayout(1, kv_heads, size, dtype="float32")
    cache = fx.HostKV.from_arrays(layout, [k], [v], lengths, max_tokens=640)
    scale = size**-0.5
    out, _, stats = fx.decode_attention(
        jnp.asarray(q),
        jnp.asarray(new_k),
        jnp.asarray(new_v),
        cache,
        0,
        fx.fixed(32, 0.05),
        scale=scale,
        split=split_at(0.5),
        execution=fx.Execution(dense_below_tokens=0, measure=True),
        return_selection=True,
    )
    selection = np.asarray(stats.selection)
    for b in range(batch):
        n = lengths[b] + 1
        keys = np.concatenate([k[b, : n - 1], new_k[b][None]]).astype(np.float64)
        values = np.concatenate([v[b, : n - 1], new_v[b][None]]).astype(np.float64)
        selectable = 16 * ((n - 1 - 320) // 16)
        exact, error = [], []
        for head in range(kv_heads * group):
            bits = np.unpackbits(selection[b, head].view(np.uint8), bitorder="little")
            keep = np.ones(n, bool)
            keep[64 : 64 + selectable] = np.repeat(bits.astype(bool), 16)[:selectable]
            assert keep.sum() == n - selectable + bits.sum() * 16 < n
            of = (q[b, head].astype(np.float64), keys[:, head // group], values[:, head // group])
            full_out, full_lse = numpy_attention(*of, np.ones(n, bool), scale)
            sparse_out, sparse_lse = numpy_attention(*of, keep, scale)
            np.testing.assert_allclose(out[b, head], sparse_out, atol=1e-5)
            recall = np.exp(sparse_lse - full_lse)
            np.testing.assert_allclose(stats.recall[b, head], recall, atol=1e-5)
            exact.append(np.linalg.norm(full_out))
            error.append(np.linalg.norm(sparse_out - full_out))
        np.testing.assert_allclose(stats.output_error[b], np.asarray(error) / max(exact), atol=1e-5)
    assert jax.tree.all(jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), stats.recall))
