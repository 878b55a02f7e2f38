"""Labels against brute force, and recorded plans in real decode steps."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import fluxion_jax as fx
from fluxion_jax.bench import selection_quality as quality
from fluxion_jax.bench.capture import Captured
from fluxion_jax.cache.layout import GRANULARITIES_TOKENS
from fluxion_jax.errors import ConfigError, IntegrityError
from fluxion_jax.evaluation.labels import Labels, label_layer, make_labels
from fluxion_jax.models.load import LoadedModel
from fluxion_jax.policy import ReplayPolicy, parse_policy
from tests.generation import tiny

TOLERANCES = (0.02, 0.1, 0.4)


def test_budgets_are_the_smallest_of_brute_force():
    rng = np.random.default_rng(0)
    q = 3 * rng.normal(size=(3, 4, 8)).astype(np.float32)
    k, v = (rng.normal(size=(2, 240, 8)).astype(np.float32) for _ in range(2))
    layer, positions, host = Captured(q, k, v, 0.5), np.array([237, 238, 239]), slice(10, 218)
    budgets, mass, window_error = label_layer(layer, positions, host, TOLERANCES)
    attention = quality.full_attention(layer, positions, host)
    seen = set()
    for d, granularity in enumerate(GRANULARITIES_TOKENS):
        scores = quality.unit_scores("integer", layer, attention, host, granularity, False)
        judged = [
            quality.judge(quality.select(scores, n), layer, attention, host, granularity)
            for n in range(scores.shape[-1] + 1)
        ]
        for e, tolerance in enumerate(TOLERANCES):
            for t, n in np.ndindex(3, 4):
                at = n // 2, t, n % 2
                errors = [error[at] for _, error in judged]
                count = next(i for i, error in enumerate(errors) if error <= tolerance)
                assert budgets[e, d, t, n] == count * granularity
                kept = judged[count][0][at] + attention.window_mass[at]
                assert mass[e, d, t, n] == pytest.approx(kept, rel=1e-4)
                assert window_error[t, n] == pytest.approx(errors[0], rel=1e-4)
                seen.add(count)
    assert len(seen) > 4


def made_up(budgets: np.ndarray) -> Labels:
    errors = np.asarray([[[0.01, 0.05, 0.3, 0.5]]], np.float32)
    return Labels(1023, (0.02, 0.1), budgets, np.ones(budgets.shape, np.float32), errors, 640)


def test_the_plan_reads_the_fewest_bytes():
    # Two groups of two heads: the second streams, the first needs more of coarser units.
    budgets = np.zeros((2, 4, 1, 1, 4), np.int32)
    budgets[0, :, 0, 0, 0] = 16, 32, 64, 640
    budgets[0, :, 0, 0, 1] = 16, 64, 64, 128
    labels = made_up(budgets)
    np.testing.assert_allclose(labels.streaming_fraction(), [0.25, 0.5])
    assert labels.budget_fraction()[0, 0] == pytest.approx(32 / 1024 / 4)
    layout = fx.KVLayout(num_layers=1, num_kv_heads=2, head_dim=64, dtype="bfloat16")
    plan = labels.policy(0.02, layout)
    # Bytes a token of K/V 256, a summary 128: 16 costs 8192 + 5120, 32 costs 24576 + 2560.
    np.testing.assert_array_equal(plan.granularity, [[[[16, 128]]]])
    np.testing.assert_array_equal(plan.budget_tokens, [[[[16, 16, 0, 0]]]])
    assert not labels.policy(0.1, layout).budget_tokens.any()
    with pytest.raises(ConfigError, match=r"expected a tolerance of \(0\.02, 0\.1\), got 0\.3"):
        labels.policy(0.3, layout)


def test_recorded_plans_are_kept_and_looked_up(tmp_path):
    rng = np.random.default_rng(1)
    recorded = ReplayPolicy(
        np.asarray([10, 20], np.int32),
        rng.choice(GRANULARITIES_TOKENS, (2, 3, 2, 2)).astype(np.int32),
        rng.integers(0, 99, (2, 3, 2, 4), np.int32),
    )
    recorded.save(tmp_path / "plans.npz")
    policy = parse_policy(f"replay:{tmp_path}/plans.npz")
    assert str(policy) == str(recorded)
    layout = fx.KVLayout(2, 2, 8)
    features = fx.policy.Features(
        np.zeros((2, 4, 8), np.float32), None, None, 1, 2, layout, *[None] * 6
    )
    for lengths, steps in (([11, 21], (0, 0)), ([13, 22], (2, 1)), ([1, 99], (0, 2))):
        plan = policy.plan(features, np.asarray(lengths))
        for row, step in enumerate(steps):
            np.testing.assert_array_equal(
                plan.budget_tokens[row], recorded.budget_tokens[row, step, 1]
            )
            np.testing.assert_array_equal(plan.granularity[row], recorded.granularity[row, step, 1])
    with pytest.raises(ConfigError, match="expected a recording of 1 row or of 3, got 2"):
        policy.plan(features._replace(q=np.zeros((3, 4, 8))), np.ones(3, int))
    sizes = "a model with {} layers, {} KV heads and {} query heads, got one with 2, 2 and 4; rec"
    for other, change in (
        ((3, 2, 4), {"layout": fx.KVLayout(3, 2, 8)}),
        ((1, 2, 4), {"layout": fx.KVLayout(1, 2, 8), "layer": 0}),
        ((2, 1, 4), {"num_kv_heads": 1}),
        ((2, 2, 6), {"q": np.zeros((2, 6, 8))}),
    ):
        with pytest.raises(ConfigError, match=sizes.format(*other)):
            policy.plan(features._replace(**change), np.ones(2, int))
    with pytest.raises(ConfigError, match="expected a file of recorded plans"):
        parse_policy("replay:none.npz")
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(IntegrityError, match="expected recorded plans in"):
        parse_policy(f"replay:{tmp_path}/text.npz")
    np.savez(tmp_path / "other.npz", first_position=[1], granularity=[1], budget_tokens=[1])
    with pytest.raises(IntegrityError, match=r"expected integer arrays \[R\]"):
        parse_policy(f"replay:{tmp_path}/other.npz")
    halves = dataclasses.replace(recorded, budget_tokens=recorded.budget_tokens / 2)
    halves.save(tmp_path / "halves.npz")
    with pytest.raises(IntegrityError, match=r"expected integer arrays \[R\]"):
        parse_policy(f"replay:{tmp_path}/halves.npz")
    np.save(tmp_path / "one.npy", recorded.granularity)
    with pytest.raises(IntegrityError, match=r"got one array of shape \(2, 3, 2, 2\); name a file"):
        parse_policy(f"replay:{tmp_path}/one.npy")
    # The file has exactly the name that was given.
    recorded.save(tmp_path / "plans")
    assert str(parse_policy(f"replay:{tmp_path}/plans")) == str(recorded)
    with pytest.raises(ConfigError, match="expected the path of the file to write, got int"):
        recorded.save(3)


def test_the_oracle_keeps_to_its_tolerance_in_real_steps():
    model = tiny.llama()
    loaded = LoadedModel(model, None, model.config, "tiny")
    (tokens,) = tiny.prompts([520])
    (labels,) = make_labels(loaded, tokens, [500], steps=4, tolerances=TOLERANCES, progress=False)
    layout = model.config.kv_layout("float32")
    assert labels.host_tokens == 176
    assert labels.budget_tokens.shape == (3, 4, layout.num_layers, 4, model.config.num_heads)
    assert (np.diff(labels.budget_tokens, axis=0) <= 0).all()
    cache = tiny.new_cache(model, batch=1)
    fx.prefill(model, tokens[:500], cache, chunk_tokens=tiny.CHUNK_TOKENS, progress=False)
    measured = fx.Execution(dense_below_tokens=0, measure=True)

    def error(policy: object) -> fx.Scores:
        return fx.score(
            model,
            cache.fork(),
            [tokens[500:505]],
            policy=policy,
            execution=measured,
            progress=False,
        )

    strict, loose = (error(labels.policy(t, layout)) for t in (0.02, 0.4))
    assert strict.stats.output_error.max() <= 0.021
    assert loose.stats.output_error.max() <= 0.4
    assert loose.stats.host_bytes < strict.stats.host_bytes
    nothing = labels.policy(0.4, layout)
    nothing = ReplayPolicy(nothing.first_position, nothing.granularity, 0 * nothing.budget_tokens)
    assert error(nothing).stats.host_bytes == 0
    wanted = labels.window_error.mean(axis=(1, 2))
    np.testing.assert_allclose(error(nothing).stats.output_error, wanted, rtol=0.05)


@pytest.mark.parametrize("first", [300, 518])
def test_stretches_outside_of_the_text_are_refused(first):
    model = tiny.llama()
    loaded = LoadedModel(model, None, model.config, "tiny")
    with pytest.raises(ConfigError, match=rf"expected stretches from 336 to 512, got {first}"):
        make_labels(loaded, [1] * 520, [first])
