"""Plan sets: the paper's figures, recorded heads, and the union that is imposed on them."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from fluxion_jax.bench import plan_sets
from fluxion_jax.bench.plan_sets import Fixed, Paper, Target, cheapest, fit_growth, impose
from fluxion_jax.bench.policy import FULL, QUICK, plan_set
from fluxion_jax.bench.step_programs import LLAMA_8B, QWEN_7B
from fluxion_jax.errors import ConfigError, IntegrityError
from fluxion_jax.policy.selector import select_granularity

CONTEXT = (131072, 32768)
SIZES = np.asarray([16, 32, 64, 128])


@pytest.mark.parametrize("summaries", ["host", "device"])
def test_the_choice_is_the_selectors(summaries):
    layout = LLAMA_8B.kv_layout(summaries=summaries)
    rng = np.random.default_rng(3)
    budgets = np.sort(rng.integers(1, 9000, (5, 32, 4)), axis=-1)
    budgets[rng.random((5, 32)) < 0.4] = 0
    held = np.asarray([1600, 8000, 32000, 64, 131072])
    best, chosen = cheapest(budgets, held, layout)
    granularity, tokens, _ = select_granularity(jnp.asarray(budgets), jnp.asarray(held), layout)
    np.testing.assert_array_equal(SIZES[best], granularity)
    np.testing.assert_array_equal(chosen, tokens)


@pytest.mark.parametrize("config", [LLAMA_8B, QWEN_7B])
@pytest.mark.parametrize(("mean_over", "of_reading"), [("reading", 0.02), ("all", 0.08)])
def test_paper_like_plans_have_the_papers_figures(config, mean_over, of_reading):
    layout = config.kv_layout()
    target = Paper(mean_over=mean_over).target(config, layout, CONTEXT, 3)
    groups = (2, 3, config.num_layers, config.num_kv_heads)
    assert target.granularity.shape == groups
    grouped = target.budget_tokens.reshape(*groups, -1)
    np.testing.assert_array_equal(grouped.min(axis=-1), grouped.max(axis=-1))
    reads = grouped[..., 0] > 0
    assert reads.mean() == pytest.approx(0.25, abs=1e-3)
    for row, tokens in enumerate(CONTEXT):
        mean = grouped[row, ..., 0][reads[row]].mean() / tokens
        assert mean == pytest.approx(of_reading, rel=0.03)
    assert (target.budget_tokens % np.repeat(target.granularity, grouped.shape[-1], -1) == 0).all()


@pytest.mark.parametrize("factor", [1.0, 1.7, 2.0, 4.0])
def test_the_union_dealt_out_is_the_one_wanted(factor):
    granularity = np.full((1, 1, 1, 3), 32)
    budgets = np.asarray([[[[320] * 4 + [640, 320, 0, 0] + [0] * 4]]])
    imposed = impose(Target(granularity, budgets), factor, np.asarray([100_000]))
    units = imposed.budget_tokens.reshape(3, 4) // 32
    wanted = [np.ceil(factor * 10), np.ceil(min(factor * 20, 30)), 0]
    assert (imposed.union_tokens[0, 0, 0] // 32).tolist() == wanted
    assert units.sum(axis=1).tolist() == wanted
    assert np.ptp(units[0]) <= 1
    # Heads that stream go on doing so.
    assert units[1, 2:].tolist() == [0, 0]
    raised = impose(Target(granularity, budgets), factor, np.asarray([100_000]), 1.5)
    assert raised.union_tokens.tolist() == imposed.union_tokens.tolist()
    assert raised.budget_tokens[..., :4].sum() == 32 * np.ceil(1.5 * wanted[0])
    short = impose(Target(granularity, budgets), factor, np.asarray([64]), 1.5)
    assert short.union_tokens.max() <= 64
    assert short.budget_tokens.max() <= 64


def test_a_baseline_reads_a_twentieth_of_each_row():
    target = Fixed().target(QWEN_7B, QWEN_7B.kv_layout(), CONTEXT, 2)
    assert np.unique(target.budget_tokens[0]).tolist() == [6560]
    assert np.unique(target.budget_tokens[1]).tolist() == [1648]


def test_growth_is_fitted_to_all_lengths():
    powers = np.asarray([[0.5, 1.0], [0.0, 3.0]])
    budgets = {s: 8.0 * (s / 4096) ** powers for s in (4096, 8192, 16384)}
    budgets[8192][1, 0] = 0.0
    fit = fit_growth(budgets)
    common = np.clip(fit["exponent"], 0, 1)
    # A head that needs nothing at one length gets the common exponent; none grows beyond 1.
    np.testing.assert_allclose(fit["head_exponent"], [[0.5, 1.0], [common, 1.0]], atol=1e-3)
    one = fit_growth({s: np.full((1, 1), 3.0 * s**0.7) for s in (4096, 8192, 16384)})
    assert one["exponent"] == pytest.approx(0.7)
    assert one["scale"] == pytest.approx(3.0)
    assert one["residual_log2"] == pytest.approx(0.0, abs=1e-9)


def _document(budgets, exponent, kv_heads):
    return {
        "description": "made up",
        "kv_heads": kv_heads,
        "granularities": SIZES.tolist(),
        "recordings": [{"length_tokens": 4096}],
        "union_factor": 1.5,
        "fixed_union_factor": 1.25,
        "fit": {"scale": 1.0, "exponent": 0.5, "residual_log2": 0.0, "head_exponent": exponent},
        "length_tokens": 8192,
        "budget_tokens": budgets,
    }


def test_recorded_heads_are_stretched_and_scaled(tmp_path):
    rng = np.random.default_rng(0)
    budgets = np.sort(rng.integers(1, 400, (7, 2, 4, 4)), axis=-1)
    budgets[:, 1, 2:] = 0
    exponent = [[1.0, 0.0, 0.5, 0.5], [0.5] * 4]
    (tmp_path / "real.json").write_text(json.dumps(_document(budgets.tolist(), exponent, 2)))
    found = plan_sets.recorded("real", tmp_path)
    assert found.union_factor == 1.5
    assert "fits 1 * context ** 0.500" in found.describe()
    layout = LLAMA_8B.kv_layout()
    target = found.target(LLAMA_8B, layout, CONTEXT, 9)
    grouped = target.budget_tokens.reshape(2, 9, 32, 8, 4)
    # The second recorded group of the deeper half streams, and so do its copies.
    assert (grouped[:, :, 16:, 1::2] == 0).all()
    assert (grouped[:, :, 16:, ::2] > 0).all()
    assert (grouped[:, :, :16] > 0).all()
    # Row 1, step 0, layer 0, group 0 replays step 3; heads 0 and 1, over and over.
    scale = (32768 / 8192) ** np.asarray([1.0, 0.0, 1.0, 0.0])
    wanted = np.ceil(budgets[3, 0, [0, 1, 0, 1]] * scale[:, None]).astype(np.int64)
    unit = target.granularity[1, 0, 0, 0]
    at = list(SIZES).index(unit)
    np.testing.assert_array_equal(grouped[1, 0, 0, 0], -(-wanted[:, at] // unit) * unit)
    # Copies of a layer do not move in step.
    assert (grouped[0, :, 0] != grouped[0, :, 1]).any()


def test_what_is_no_plan_set_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"expected recorded plans out of .*got 'nothing'"):
        plan_sets.recorded("nothing")
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"got none of .*budget_tokens"):
        plan_sets.recorded("empty", tmp_path)


def test_every_set_that_is_measured_exists():
    for case in (case for settings in (QUICK, FULL) for case in settings.cases):
        config = FULL.models[case.model]
        for name in (*case.sets, *case.curve):
            found = plan_set(name)
            assert found.describe()
            target = found.target(config, config.kv_layout(), case.context_tokens, 2)
            assert np.isin(target.granularity, SIZES).all()
            assert target.budget_tokens.any()
    assert {plan_set(n).union_factor for n in FULL.cases[0].curve} == {1, 2, 3, 4}
