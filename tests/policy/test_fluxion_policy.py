from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fluxion_jax as fx
import pallas_kernels
from fluxion_jax.calibration.storage import make_policy
from fluxion_jax.decode import decode_chunk
from fluxion_jax.models import Decoder, ModelConfig
from fluxion_jax.policy import FluxionPolicy, parse_policy
from fluxion_jax.policy.features import NAMES, head_features
from fluxion_jax.policy.fluxion_policy import DEFAULT_TOLERANCE, Safety
from fluxion_jax.policy.head_predictor import HeadPredictor
from fluxion_jax.policy.protocol import NEWEST_TOKENS, Features
from pallas_kernels.by_sequence import by_sequence_triton
from tests.generation import tiny

TOLERANCES = (0.05, 0.1, 0.4)


def random_policy(seed: int = 7, margin: float = -3.0, threshold: float = 0.1) -> FluxionPolicy:
    """An untrained predictor, whose margin makes budgets of about an eighth."""
    config = tiny.llama().config
    predictor = HeadPredictor(config.num_layers, config.num_heads, rngs=nnx.Rngs(seed))
    # Heads that differ, as trained ones do.
    predictor.heads[...] = 20 * predictor.heads[...]
    safety = Safety(
        np.asarray(TOLERANCES, np.float32),
        np.asarray([threshold + 0.01, threshold, threshold - 0.01], np.float32),
        np.asarray([margin + 1, margin, margin - 1], np.float32),
    )
    return make_policy(predictor, safety, 0.1)


def a_layer(host_tokens: list[int]) -> Features:
    """What a policy sees, random, in a cache of up to 1,024 host tokens."""
    rng = np.random.default_rng(0)
    batch, heads, kv_heads, size, blocks = len(host_tokens), 6, 2, 64, 64
    layout = fx.KVLayout(2, kv_heads, size, "float32", num_heads=heads, sketch=True)
    cache = fx.HostKV.allocate(layout, batch, 16 * blocks + 320)
    sketch = cache.sketch[0]
    drawn = rng.standard_normal(sketch.runs.shape)
    drawn[..., 2:, :] = np.abs(drawn[..., 2:, :]) + 2.0
    slots = layout.window_tokens
    return Features(
        q=jnp.asarray(rng.standard_normal((batch, heads, size)), jnp.float32),
        window_out=jnp.asarray(rng.standard_normal((batch, heads, size)), jnp.float32),
        window_lse=jnp.asarray(rng.uniform(4, 6, (batch, heads)), jnp.float32),
        layer=1,
        num_kv_heads=kv_heads,
        layout=layout,
        scale=0.125,
        capacity_blocks=cache.num_host_blocks,
        host_tokens=jnp.asarray(host_tokens, jnp.int32),
        window_k=jnp.asarray(rng.standard_normal((batch, kv_heads, slots, size)), jnp.float32),
        window_positions=jnp.broadcast_to(jnp.arange(slots) + 500, (batch, slots)),
        sketch=sketch._replace(runs=jnp.asarray(drawn, jnp.float32)),
    )


def test_the_plan_is_what_predictor_safety_and_selector_say():
    policy, features = random_policy(), a_layer([1024, 176, 0])
    plan = policy.plan(features, jnp.asarray([1400, 500, 100]))
    predictor = nnx.merge(policy.graph, policy.weights)
    needs = predictor(head_features(features), predictor.heads[1], policy.tolerance)
    streaming = np.asarray(needs.streaming) > 0.1
    assert 0 < streaming[:2].sum() < streaming[:2].size
    granularity, budgets = np.asarray(plan.granularity), np.asarray(plan.budget_tokens)
    for b, host in enumerate([1024, 176, 0]):
        for n in range(6):
            size = granularity[b, n // 3]
            fraction = needs.base[b, n] + needs.growth[b, n] * np.log2(size / 16) - 3.0
            wanted = np.ceil(np.ceil(min(host * 2.0 ** float(fraction), host)) / size) * size
            expected = 0 if streaming[b, n] or host == 0 else max(wanted, size)
            assert budgets[b, n] == expected, (b, n)
    assert not np.asarray(plan.clipped).any()
    greedy = random_policy(margin=5.0).plan(features, jnp.asarray([1400, 500, 100]))
    np.testing.assert_array_equal(
        greedy.clipped, ~streaming & (np.asarray(features.host_tokens) > 0)[:, None]
    )
    np.testing.assert_array_equal(
        (np.asarray(plan.notes.streaming_logit) > 0), np.asarray(needs.streaming) > 0.1
    )


def test_features_are_the_same_whether_the_windows_kernel_brings_its_scores_or_not():
    features = a_layer([1024, 176, 0])
    sinks = features.layout.sink_tokens
    slot = jnp.broadcast_to(
        jnp.arange(features.layout.window_tokens), (3, features.layout.window_tokens)
    )
    positions = jnp.where(slot < sinks, slot, slot + 500)
    features = features._replace(window_positions=positions)
    scores = pallas_kernels.window_scores(
        features.q,
        features.window_k,
        positions,
        positions.max(axis=-1),
        scale=features.scale,
        sink_tokens=sinks,
        newest_tokens=NEWEST_TOKENS,
    )
    got = head_features(features._replace(window_scores=scores))
    np.testing.assert_array_equal(got, head_features(features))
    raised = head_features(features._replace(window_scores=scores + 1.0))
    for name in ("sink_odds", "newest_odds", "window_peak_odds"):
        column = NAMES.index(name)
        np.testing.assert_allclose(raised[..., column], got[..., column] + 1.0, atol=1e-5)


def test_a_larger_tolerance_takes_its_own_safety():
    policy = random_policy()
    for tolerance, threshold, margin in ((0.05, 0.11, -2.0), (0.4, 0.09, -4.0), (0.2, 0.095, -3.5)):
        got = policy.with_tolerance(tolerance).safety.at(np.float32(tolerance))
        np.testing.assert_allclose(got, (threshold, margin), rtol=1e-5)


@pytest.mark.parametrize("tolerance", [0.04, 0.5, float("nan")])
def test_a_tolerance_beyond_the_calibration_is_refused(tolerance):
    with pytest.raises(fx.ConfigError, match=r"within the calibrated range, 0\.05 to 0\.4"):
        random_policy().with_tolerance(tolerance)


def test_what_is_not_a_number_is_read_so_that_it_surfaces():
    features = a_layer([1024])
    features = features._replace(q=features.q.at[0, 4, 7].set(jnp.nan))
    plan = random_policy().plan(features, jnp.asarray([1400]))
    assert (np.asarray(plan.budget_tokens)[0, 4] == 1024).all()


KERNELS = [
    pytest.param(True, id="interpreted"),
    pytest.param(False, id="gpu", marks=pytest.mark.gpu),
]


def as_a_gpu_does(patch) -> None:
    """There the minimum and the maximum of a number and none are the number."""
    patch.setattr(jnp, "maximum", jnp.fmax)
    patch.setattr(jnp, "minimum", jnp.fmin)
    patch.setattr(jnp, "clip", lambda x, low, high: jnp.fmin(jnp.fmax(x, low), high))


@pytest.mark.parametrize("interpret", KERNELS)
@pytest.mark.parametrize("fault", [None, "query", "key"])
def test_the_kernels_plan_what_xla_plans(fault, interpret, monkeypatch):
    features, by_sequence = a_layer([1024, 176, 0]), pallas_kernels.by_sequence
    if fault == "query":
        features = features._replace(q=features.q.at[0, 4, 7].set(jnp.nan))
    if fault == "key":
        runs = features.sketch.runs.at[0, 1, 3, 0, 5].set(jnp.nan)
        features = features._replace(sketch=features.sketch._replace(runs=runs))
    seen = []

    def plan(kernels: bool) -> fx.Plan:
        def chosen(function, rows, shared, *, implementation=None, **sizes):
            if not kernels:
                return by_sequence(function, rows, shared, implementation="xla", **sizes)
            seen.append(type(function).__name__)
            if not interpret:
                return by_sequence(function, rows, shared, implementation="triton", **sizes)
            with pytest.MonkeyPatch.context() as patch:
                as_a_gpu_does(patch)
                return by_sequence_triton(rows, shared, function=function, interpret=True, **sizes)

        monkeypatch.setattr(pallas_kernels, "by_sequence", chosen)
        return random_policy().plan(features, jnp.asarray([1400, 500, 100]))

    wanted, got = plan(kernels=False), plan(kernels=True)
    assert seen == ["PredictorInputs", "Conclusion"]
    for name in ("granularity", "budget_tokens", "clipped"):
        np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name), err_msg=name)
    for x, y in zip(got.notes, wanted.notes, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)
    if fault is not None:
        assert (np.asarray(got.budget_tokens)[0] == 1024).any()


@pytest.mark.native
def test_a_loop_over_layers_is_told_that_it_has_no_sketch():
    cache = fx.HostKV.allocate(fx.KVLayout(2, 2, 64, "float32"), 1, 1344, stacked=True)
    q, kv = jnp.ones((1, 6, 64)), jnp.ones((1, 2, 64))

    @jax.jit
    def step(cache, q, kv, layer, policy):
        return fx.decode_attention(
            q, kv, kv, cache, layer, policy, scale=0.1, split=fx.policy.parse_split("host")
        )

    with pytest.raises(fx.ConfigError, match="expected a cache that keeps a sketch"):
        step(cache, q, kv, jnp.asarray(0), random_policy())


def test_another_models_predictor_is_refused():
    features = a_layer([1024])
    with pytest.raises(fx.ConfigError, match="expected a model of 2 layers and 6 query heads"):
        random_policy().plan(features._replace(layer=2), jnp.asarray([1400]))


@pytest.fixture(scope="module")
def recorded() -> tuple[fx.Result, list[list[int]]]:
    rows = tiny.prompts()
    execution = fx.Execution(dense_below_tokens=0, record=True)
    return tiny.generate(
        tiny.llama(), rows, policy=random_policy(), max_new_tokens=40, execution=execution
    ), rows


def test_a_generation_is_sparse_and_replays_bit_for_bit(recorded, tmp_path):
    result, rows = recorded
    assert 0 < result.stats.read_fraction < 0.9
    assert result.plans.granularity.shape == (3, 40, 2, 2)
    result.plans.save(tmp_path / "plans.npz")
    again = tiny.generate(
        tiny.llama(), rows, policy=f"replay:{tmp_path}/plans.npz", max_new_tokens=40
    )
    for got, expected in zip(again.tokens, result.tokens, strict=True):
        np.testing.assert_array_equal(got, expected)
    for got, expected in zip(again.log_probs, result.log_probs, strict=True):
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(again.stats.host_blocks, result.stats.host_blocks)
    for got, expected in zip(again.cache.window_k, result.cache.window_k, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_tolerance_and_weights_change_without_recompiling(recorded):
    rows = tiny.prompts(seed=1)
    execution = fx.Execution(dense_below_tokens=0, record=True)
    before = decode_chunk.compilations()
    read = []
    for policy in (
        random_policy().with_tolerance(0.05),
        random_policy().with_tolerance(0.3),
        random_policy(seed=1),
        dataclasses.replace(random_policy(), tolerance=np.float32(0.07)),
    ):
        result = tiny.generate(
            tiny.llama(), rows, policy=policy, max_new_tokens=40, execution=execution
        )
        read.append(result.stats.host_bytes)
    assert decode_chunk.compilations() == before
    assert len(set(read)) == 4
    assert read[0] > read[1]


def test_recording_needs_the_query_heads_and_own_rankings():
    model, rows = tiny.llama(), tiny.prompts()
    execution = fx.Execution(dense_below_tokens=0, record=True)
    layout = dataclasses.replace(model.config.kv_layout("float32"), num_heads=None)
    cache = fx.HostKV.allocate(layout, tiny.BATCH, tiny.CAPACITY_TOKENS)
    with pytest.raises(fx.ConfigError, match="expected a cache whose layout names its query heads"):
        tiny.generate(model, rows, cache=cache, execution=execution)
    with pytest.raises(fx.ConfigError, match="ranks each head by itself"):
        tiny.generate(model, rows, policy="fixed:16:0.1:group", execution=execution)
    config = dataclasses.replace(
        ModelConfig.tiny_gemma3(), num_layers=1, sliding_layers=(0,), sliding_window=16
    )
    slides = Decoder.random(config)
    cache = tiny.new_cache(slides)
    with pytest.raises(fx.ConfigError, match=r"record=True\), got sliding windows in all layers"):
        tiny.generate(slides, rows, cache=cache, execution=execution)
    assert not np.asarray(cache.lengths).any()


@pytest.mark.parametrize(
    "name", ["fluxion:", "fluxion:0.1", "fluxion:tolerance=x", "fluxion:weights=", "fluxion:a=1"]
)
def test_names_that_are_not_policies(name):
    with pytest.raises(fx.ConfigError, match="'fluxion:tolerance=T'"):
        parse_policy(name)


def test_names_need_a_model_with_calibrated_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(fx.ConfigError, match="expected a model for the policy 'fluxion'"):
        parse_policy("fluxion")
    default = re.escape(f"tolerance above 0, got -1.0; {DEFAULT_TOLERANCE} is the default")
    with pytest.raises(fx.ConfigError, match=default):
        parse_policy("fluxion:tolerance=-1")
    with pytest.raises(fx.ConfigError, match="run: fluxion calibrate --model"):
        tiny.generate(tiny.llama(), tiny.prompts(), policy="fluxion")


def test_a_policy_is_a_pytree_of_numbers():
    policy = random_policy()
    leaves, structure = jax.tree.flatten(policy)
    assert all(isinstance(x, jax.Array | np.ndarray) for x in leaves)
    assert structure == jax.tree.structure(random_policy(seed=1).with_tolerance(0.3))
    assert str(policy) == "fluxion:tolerance=0.1"


def test_the_documented_policy_plans():
    text = (Path(__file__).parents[2] / "docs" / "policies.md").read_text()
    (snippet,) = re.findall(r"```python\n(import dataclasses\n.*?)```", text, re.S)
    code, _, use = snippet.rpartition("\nfx.generate(")
    names: dict = {"__name__": __name__}
    exec(code, names)
    policy = eval(re.search(r"policy=(.*)\)$", use.strip())[1], names)
    features = a_layer([1024, 176])
    plan = policy.plan(features._replace(layer=0), jnp.asarray([1400, 500]))
    assert np.asarray(plan.budget_tokens)[:, 0].tolist() == [1400, 500]
    plan = policy.plan(features._replace(layer=2), jnp.asarray([1400, 500]))
    assert np.asarray(plan.budget_tokens)[:, 5].tolist() == [70, 25]
    assert parse_policy(policy) is policy


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_safety_is_interpolated_over_the_logarithm_and_flat_beyond(count):
    rng = np.random.default_rng(count)
    known = np.sort(rng.uniform(0.01, 0.9, count)).astype(np.float32)
    logit, margin = (rng.standard_normal(count).astype(np.float32) for _ in range(2))
    safety = Safety(known, logit, margin)
    for tolerance in (0.005, *known, *np.sqrt(known[1:] * known[:-1]), 0.95):
        found = safety.at(jnp.float32(tolerance))
        for got, values in zip(found, (logit, margin), strict=True):
            wanted = np.interp(np.log2(tolerance), np.log2(known), values)
            assert float(got) == pytest.approx(wanted, abs=1e-5)
