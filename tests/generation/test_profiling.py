"""The profile of a step, and the figures of plans, split and time."""

from __future__ import annotations

import gzip
import itertools
import json

import jax
import numpy as np
import pytest
from flax import nnx

import fluxion_jax as fx
import host_ops
from fluxion_jax import profiling
from fluxion_jax.errors import ConfigError, FluxionError, UnsupportedError
from fluxion_jax.policy import fixed, one_sided, split_at
from fluxion_jax.profiling import profile_step
from fluxion_jax.step_figures import plans_figure, split_figure, timeline_figure
from tests.generation.tiny import ALWAYS_SPARSE, generate, llama, prefilled, prompts

STEPS = 5


@pytest.fixture(scope="module")
def recorded():
    execution = fx.Execution(dense_below_tokens=0, record=True)
    return generate(
        llama(), prompts(), policy="fixed:32:0.1", max_new_tokens=STEPS, split=0.5,
        execution=execution,
    )  # fmt: skip


def step_under(split):
    model = llama()
    graph, params = nnx.split(model)

    @fx.jit
    def step(params, tokens, cache, split):
        return nnx.merge(graph, params).decode_step(
            tokens, cache, fixed(16, 0.1), split=split, execution=ALWAYS_SPARSE
        )

    caches = [prefilled(model, prompts())]

    def run():
        _, caches[0], stats = step(params, np.zeros(3, np.int32), caches[0], split)
        return stats

    jax.block_until_ready(run())
    return run


@pytest.mark.native
def test_a_profile_has_every_hand_over_in_its_place():
    timeline = profile_step(step_under(split_at(0.5)))
    layers = llama().config.num_layers
    assert timeline.host_times_s.shape == (layers, len(host_ops.TIMES))
    edges = np.stack(
        [timeline.submit_s, timeline.share_s, timeline.collect_s, timeline.done_s], axis=1
    ).reshape(-1)
    assert edges[0] > 0
    assert all(a <= b for a, b in itertools.pairwise(edges))
    assert edges[-1] <= timeline.end_s
    # The host's clock and the profiler's agree on how long the host had: from submit to done.
    span = timeline.host_times_s[:, host_ops.TIMES.index("span")]
    assert (span > 0).all()
    assert (span <= timeline.done_s - timeline.submit_s + 1e-4).all()
    figure = timeline_figure(timeline, "A step")
    whole, one = figure.axes
    assert len(whole.collections) == len(one.collections) == 8
    assert one.get_xlim()[1] - one.get_xlim()[0] < whole.get_xlim()[1] - whole.get_xlim()[0]


def test_of_steps_as_large_the_last_is_taken(tmp_path):
    # The one before was not waited for, and its last operations came as the trace began.
    events = [
        {"ts": ts, "dur": 2.0, "args": {"hlo_op": op, "run_id": run}}
        for run, start in (("7", 50.0), ("5", 10.0), ("6", 90.0))
        for ts, op in ((start, "ffi_call.1"), (start + 5, "ffi_call.2"))
    ]
    events = events[:-1]
    trace = tmp_path / "a.trace.json.gz"
    trace.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    assert profiling._operations(trace) == [(50.0, 52.0, "ffi_call.1"), (55.0, 57.0, "ffi_call.2")]


@pytest.mark.native
def test_a_step_without_host_work_has_no_profile():
    with pytest.raises(FluxionError, match="expected 2 calls of native host operations"):
        profile_step(step_under(one_sided("device")))


def test_no_profile_on_another_backend(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(UnsupportedError, match="expected the CPU backend, got gpu"):
        profile_step(lambda: pytest.fail("must not run"))


def test_the_maps_show_every_head_in_every_step(recorded):
    plans, config = recorded.plans, llama().config
    figure = plans_figure(plans, "Plans", row=2)
    maps = [axes.images[0].get_array() for axes in figure.axes[:3]]
    heads = config.num_layers * config.num_heads
    groups = config.num_layers * config.num_kv_heads
    assert [m.shape for m in maps] == [(heads, STEPS), (groups, STEPS), (heads, STEPS)]
    assert (maps[0] == 1).all()  # a fixed policy has no streaming heads
    assert (maps[1] == 2).all()  # the second of the granularities, after "nothing read"
    expected = np.moveaxis(np.asarray(plans.budget_tokens)[2], 0, -1).reshape(heads, STEPS)
    np.testing.assert_array_equal(maps[2], expected)
    with pytest.raises(ConfigError, match="expected a row of 3, got 3"):
        plans_figure(plans, "Plans", row=3)
    with pytest.raises(ConfigError, match="expected a label for each of 5 steps, got 1"):
        plans_figure(plans, "Plans", labels=["a"])
    labelled = plans_figure(plans, "Plans", labels=list("abcde")).axes[0]
    assert [text.get_text() for text in labelled.get_xticklabels()] == list("abcde")


def test_heads_that_read_nothing_are_streaming_and_groups_of_them_read_nothing(recorded):
    budget = np.array(recorded.plans.budget_tokens)
    group = llama().config.num_heads // llama().config.num_kv_heads
    budget[:, :, 0, :group] = 0
    budget[:, :, 1, 0] = 0
    plans = fx.policy.ReplayPolicy(
        recorded.plans.first_position, recorded.plans.granularity, budget
    )
    figure = plans_figure(plans, "Plans")
    streaming, granularity, shown = (axes.images[0].get_array() for axes in figure.axes[:3])
    heads = llama().config.num_heads
    np.testing.assert_array_equal(streaming[:, 0] == 0, budget[0, 0].reshape(-1) == 0)
    assert (granularity[0] == 0).all()
    assert (granularity[1:] > 0).all()
    assert np.ma.getmaskarray(np.ma.masked_invalid(shown))[heads, 0]


def test_the_bars_of_a_split_add_up_to_the_bytes_read(recorded):
    stats = recorded.stats
    axes = split_figure(stats, "Split").axes[0]
    bars = axes.patches
    kib = sum(bar.get_width() for bar in bars)
    assert kib * 1024 * stats.num_steps == pytest.approx(stats.host_bytes)
    assert len(bars) == 4 * llama().config.num_layers
    by_name = {
        bar.get_label(): sum(b.get_width() for b in bar) * 1024 * stats.num_steps
        for bar in axes.containers
    }
    assert by_name["host: keys and values"] == pytest.approx(
        stats.host_blocks.sum() * stats.layout.block_bytes
    )
    assert by_name["device: summaries"] == pytest.approx(
        stats.device_units.sum() * stats.layout.unit_summary_bytes
    )


def test_a_table_by_layer_adds_up(recorded):
    stats = recorded.stats
    header, *rows, total = stats.table().splitlines()
    assert "layer" in header
    assert len(rows) == llama().config.num_layers
    kib = [float(row.split()[1]) + float(row.split()[2]) for row in rows]
    assert sum(kib) == pytest.approx(stats.host_bytes / 1024 / stats.num_steps, rel=0.01)
    assert total.split()[0] == "all"
