from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

import fluxion_jax as fx
from fluxion_jax.calibration import Settings, load_calibration, model_identity
from fluxion_jax.calibration.calibrate import divide, fit, without
from fluxion_jax.calibration.recording import Recorded
from fluxion_jax.calibration.report import calibration_figure, render
from fluxion_jax.calibration.samples import ERRORS, HeadSamples, collect_samples
from fluxion_jax.calibration.storage import save_calibration
from fluxion_jax.calibration.texts import CalibrationText
from fluxion_jax.calibration.training import error_left, flatten
from fluxion_jax.models import Decoder
from fluxion_jax.models.load import LoadedModel
from fluxion_jax.policy.features import FAMILIES, NAMES, NUM_FEATURES
from fluxion_jax.policy.fluxion_policy import DEFAULT_TOLERANCE
from tests.generation import tiny

TOLERANCES = (0.1, 0.2, 0.4)
SETTINGS = Settings(tolerances=TOLERANCES, training_steps=400)


def made_up(texts: int = 6, steps: int = 40, layers: int = 2, heads: int = 6) -> HeadSamples:
    """Needs that two features tell: whether a head streams, and how much it reads."""
    rng = np.random.default_rng(0)
    count = texts * steps
    features = rng.standard_normal((count, layers, heads, NUM_FEATURES)).astype(np.float32)
    error = features[..., NAMES.index("window_error")]
    spread = features[..., NAMES.index("entropy_tokens")]
    sizes = np.asarray([16, 32, 64, 128])
    budgets = np.zeros((count, len(TOLERANCES), 4, layers, heads), np.int32)
    for e, tolerance in enumerate(TOLERANCES):
        streams = error < np.log2(tolerance / 0.2)
        for d, size in enumerate(sizes):
            tokens = np.minimum(2.0 ** (6 + spread + 0.4 * d), 2048)
            budgets[:, e, d] = np.where(streams, 0, np.ceil(tokens / size) * size)
    return HeadSamples(
        features,
        budgets,
        np.exp2(error).astype(np.float32) * 0.2,
        np.full(count, 2048, np.int32),
        np.repeat(np.arange(texts), steps).astype(np.int32),
        tuple(range(layers)),
        TOLERANCES,
        fx.KVLayout(layers, 2, 64, "float32", num_heads=heads, sketch=True),
    )


@pytest.fixture(scope="module")
def fitted():
    return fit(made_up(texts=12), SETTINGS, 2, 6, progress=False)


@pytest.mark.slow
def test_a_predictor_learns_what_its_features_tell(fitted):
    _, report = fitted
    assert report["losses"][-1] < 0.5 * report["losses"][0]
    rows = {(r["method"], r["tolerance"]): r for r in report["rows"]}
    for tolerance in TOLERANCES:
        own = rows["predictor", tolerance]
        assert own["accuracy"] > 0.9
        assert own["under_budget"] < 0.05
        for other in ("constant", "per_head", "last_step"):
            assert own["given_fraction"] < 0.6 * rows[other, tolerance]["given_fraction"]


def test_the_parts_share_no_text():
    samples = made_up()
    parts = [set(part.text.tolist()) for part in divide(samples)]
    assert set.union(*parts) == set(range(6))
    assert sum(map(len, parts)) == 6
    assert all(parts)


def test_samples_are_flattened_by_step_layer_and_head():
    samples = made_up(texts=3, steps=5)
    flat = flatten(samples)
    at = (7, 1, 4)
    row = (at[0] * 2 + at[1]) * 6 + at[2]
    assert (flat.layer[row], flat.head[row]) == (1, 4)
    np.testing.assert_array_equal(flat.features[row], samples.features[at])
    with np.errstate(divide="ignore"):
        needed = np.log2(samples.budget_tokens[7, :, :, 1, 4] / 2048)
    np.testing.assert_allclose(flat.needed[row], needed, rtol=1e-6)
    held = without(flat, "cross_head").features
    kept = [i for i, name in enumerate(NAMES) if name not in FAMILIES["cross_head"]]
    np.testing.assert_array_equal(held[:, kept], flat.features[:, kept])
    assert not np.delete(held, kept, axis=1).any()
    assert flat.window_error[row] == samples.window_error[at]


def test_what_is_left_is_the_error_over_what_is_missing():
    # Budgets of 2 ** (-2, -4, -7) for errors of 0.1, 0.2, 0.5; without the host it is 0.3.
    needed = np.full((1, 3, 4), -9.0)
    needed[0, :, 0] = [-2, -4, -7]
    errors, window = np.asarray([0.1, 0.2, 0.5]), np.asarray([0.3])
    for given, which, expected in (
        (-2.0, 0, 0.0),
        (-3.0, 0, 0.1),
        (-5.0, 0, 2 * 0.1 + 0.2),
        (-5.0, 1, 0.1),
        (-8.0, 1, 3 * 0.1 + 0.1),
        (-8.0, 2, 0.0),
    ):
        left = error_left(np.full((1, 4), given), needed, errors, window, np.asarray([which]))
        np.testing.assert_allclose(left[0, 0], expected, atol=1e-6)


@pytest.mark.slow
def test_the_report_is_a_table_and_a_figure(fitted):
    _, report = fitted
    report = {**report, "settings": {"under_budget": 0.03}}
    text = render(report)
    assert "table per head" in text
    assert text.count("predictor") == len(TOLERANCES)
    assert len(calibration_figure(report).axes) == 2
    json.dumps(report, allow_nan=False)


@pytest.mark.slow
def test_samples_are_kept_and_a_calibration_goes_on(tmp_path, monkeypatch):
    model = tiny.llama()
    loaded = LoadedModel(model, None, model.config, "tiny")
    first, second = tiny.prompts([450, 560])
    texts = [
        CalibrationText("answer", tuple(first), (), 3, 0, 576),
        CalibrationText("prose", tuple(second), (5, 6, 7, 8), 5, 16, 576),
        CalibrationText("again", tuple(second), (5, 6, 7, 8), 5, 16, 640),
    ]
    options = {"tolerances": TOLERANCES, "folder": tmp_path / "samples", "progress": False}
    samples = collect_samples(loaded, texts, chunk_tokens=64, **options)
    layers, heads = model.config.num_layers, model.config.num_heads
    assert samples.errors == tuple(sorted({*TOLERANCES, *ERRORS}))
    assert samples.features.shape == (13, layers, heads, NUM_FEATURES)
    assert samples.budget_tokens.shape == (13, len(samples.errors), 4, layers, heads)
    assert samples.window_error.shape == (13, layers, heads)
    assert samples.text.tolist() == [0] * 3 + [1] * 5 + [2] * 5
    # The host takes whole blocks when as many have left the 320 tokens of the window.
    first = [(449, 3), (559, 5), (559, 5)]
    held = [(n + i - 320) // 16 * 16 for n, count in first for i in range(count)]
    assert samples.host_tokens.tolist() == held
    known = [NAMES.index(name) for name in ("host_tokens", "tokens_since_probe")]
    host, age = np.moveaxis(samples.features[:, 0, 0, known], -1, 0)
    np.testing.assert_allclose(host, np.log2(1 + samples.host_tokens), rtol=1e-6)
    ages = [1, 2, 3, 17, 18, 19, 20, 21, 17, 18, 19, 20, 21]
    np.testing.assert_allclose(age, np.log2(1 + np.asarray(ages)), rtol=1e-6)

    def made_again(*_, **__):
        raise AssertionError

    # A calibration that was interrupted goes on with the text that it lacks.
    monkeypatch.setattr("fluxion_jax.calibration.samples.record", made_again)
    again = collect_samples(loaded, texts, chunk_tokens=64, **options)
    for a, b in zip(samples[:5], again[:5], strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(AssertionError):
        collect_samples(loaded, texts, chunk_tokens=128, **options)

    settings = Settings(tolerances=TOLERANCES, training_steps=50)
    policy, _ = fit(samples, settings, layers, heads, progress=False)
    assert float(policy.tolerance) == np.float32(min(DEFAULT_TOLERANCE, TOLERANCES[-1]))
    identity = model_identity(model, model.config)
    save_calibration(tmp_path, policy, identity, {})
    again = load_calibration(tmp_path, identity, float(policy.tolerance))
    for a, b in zip(jax.tree.leaves(policy), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    result = tiny.generate(
        model, tiny.prompts(), policy=f"fluxion:tolerance=0.4:weights={tmp_path}", max_new_tokens=5
    )
    assert all(len(row) == 5 for row in result.tokens)


def test_a_model_without_a_host_cache_is_refused_before_it_runs():
    config = dataclasses.replace(tiny.gemma3().config, num_layers=1, sliding_layers=(0,))
    model = Decoder.random(config)
    with pytest.raises(fx.ConfigError, match="got sliding windows in all layers of slides; there"):
        fx.calibrate(LoadedModel(model, None, config, "slides"), progress=False)


def test_a_cache_is_as_large_as_the_texts_length(monkeypatch):
    model = tiny.llama()
    loaded = LoadedModel(model, None, model.config, "tiny")
    asked = []

    def recorded(model, rows, **options):
        asked.append((len(rows), options["capacity_tokens"], options["slots"]))
        empty = np.zeros((0, len(rows)))
        return Recorded(empty, empty, empty, empty, empty.astype(bool))

    monkeypatch.setattr("fluxion_jax.calibration.samples.record", recorded)
    (prompt,) = tiny.prompts([500])
    texts = [CalibrationText("t", tuple(prompt), (), n, 0, s) for n, s in ((2, 600), (7, 9000))]
    collect_samples(loaded, texts, tolerances=TOLERANCES, chunk_tokens=64, progress=False)
    assert sorted(asked) == [(1, 600, 7), (1, 9000, 7)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("texts", 2),
        ("steps", 1),
        ("steps", 257),
        ("under_budget", 1.0),
        ("error_left", 0.0),
        ("tolerances", (0.1,)),
        ("tolerances", (0.2, 0.1)),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(fx.ConfigError, match=f"expected .*{name.rstrip('s')}"):
        Settings(**{name: value})
