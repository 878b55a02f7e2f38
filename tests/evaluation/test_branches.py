"""Branches of a shared prefix against the product, and the oracle's plans against brute force."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fluxion_jax as fx
from fluxion_jax.bench import selection_quality as quality
from fluxion_jax.bench.capture import Captured
from fluxion_jax.cache.layout import GRANULARITIES_TOKENS, host_tokens
from fluxion_jax.cache.sketch import run_blocks
from fluxion_jax.compilations import compilations
from fluxion_jax.errors import ConfigError, UnsupportedError
from fluxion_jax.evaluation import branch_attention, branch_sketch, branches
from fluxion_jax.evaluation.branch_attention import Past
from fluxion_jax.evaluation.branches import read_prefix, run_branches
from fluxion_jax.evaluation.oracle import ladder, oracle_plan
from fluxion_jax.policy import parse_policy
from tests.generation import tiny
from tests.policy.test_fluxion_policy import random_policy

POLICIES = ("full", "fixed:16:0.05", "fixed:32:0.2:group", "fixed:64:0.1", "fixed:128:0.3:group")
NEW_TOKENS = 40  # Several blocks leave the window meanwhile.
LENGTHS = (500, 345, 411)


def branched(policies, prompts, **options):
    model = tiny.llama()
    defaults = {
        "max_new_tokens": NEW_TOKENS,
        "stop_tokens": (),
        "layout": model.config.kv_layout("float32"),
        "dense_below_tokens": 0,
    }
    return run_branches(model, prompts, policies, **{**defaults, **options})


@pytest.fixture(scope="module")
def forked():
    """The product's answers, policy by policy, each from a fork of the same cache."""
    model, prompts = tiny.llama(), tiny.prompts(LENGTHS)
    cache = tiny.prefilled(model, [p[:-1] for p in prompts])
    return {
        name: tiny.generate(
            model,
            [p[-1:] for p in prompts],
            policy=name,
            cache=cache.fork(),
            max_new_tokens=NEW_TOKENS,
        )
        for name in POLICIES
    }


def test_branches_answer_and_count_as_the_product_does(forked):
    found = branched([parse_policy(p) for p in POLICIES], tiny.prompts(LENGTHS))
    for v, (name, result) in enumerate(forked.items()):
        assert [row.tolist() for row in result.tokens] == found.tokens[v], name
        assert found.host_bytes_per_token[v] == result.stats.host_bytes_per_token, name
        assert found.read_fraction[v] == pytest.approx(result.stats.read_fraction), name
    assert len({tuple(rows[0]) for rows in found.tokens}) > 1


@pytest.mark.slow
def test_counts_beyond_32_bits_are_exact(monkeypatch):
    """As of a large model: no layer reads that much in a step, all of them together do."""
    # About 2,900 blocks in all, and 40 of a layer in a step.
    policies, factor = [parse_policy("full")], 1 << 20
    attend = branches._attend

    def larger(*args):
        out, read, seen = attend(*args)
        return out, read._replace(blocks=read.blocks * factor, units=read.units * factor), seen

    # Limits of their own, so that no other test takes a program of this one.
    found = branched(policies, tiny.prompts(LENGTHS), dense_below_tokens=1)
    monkeypatch.setattr(branches, "_attend", larger)
    large = branched(policies, tiny.prompts(LENGTHS), dense_below_tokens=2)
    assert large.tokens == found.tokens
    np.testing.assert_array_equal(large.read_fraction, factor * found.read_fraction)
    np.testing.assert_array_equal(large.host_bytes_per_token, factor * found.host_bytes_per_token)


def test_a_branch_ends_at_its_own_stop_token(forked):
    stop = int(forked["full"].tokens[0][7])
    found = branched([parse_policy("full")], tiny.prompts(LENGTHS), stop_tokens=(stop,))
    for row, whole in zip(found.tokens[0], forked["full"].tokens, strict=True):
        expected = whole.tolist()
        if stop in expected:
            expected = expected[: expected.index(stop) + 1]
        assert row == expected


def test_short_sequences_are_read_whole():
    sparse, whole = (parse_policy(p) for p in ("fixed:16:0.05", "full"))
    found = branched([sparse, whole], tiny.prompts(LENGTHS), dense_below_tokens=1024)
    assert found.tokens[0] == found.tokens[1]
    np.testing.assert_array_equal(found.read_fraction, 1.0)


def test_summaries_are_those_of_the_cache():
    model, prompts = tiny.llama(), tiny.prompts(LENGTHS)
    cache = tiny.prefilled(model, prompts)
    layout, index = cache.layout, 1
    size = branch_attention.padded_tokens(layout, max(LENGTHS))
    rng = np.random.default_rng(0)
    k = np.zeros((len(prompts), layout.num_kv_heads, size, layout.head_dim), np.float32)
    held = np.asarray(cache.k[index])
    held = held.reshape(*held.shape[:2], -1, layout.head_dim)[:, :, : size - layout.sink_tokens]
    k[:, :, layout.sink_tokens :][:, :, : held.shape[2]] = held
    blocks = host_tokens(layout, np.asarray(LENGTHS, np.int32)) // 16
    for row, count in enumerate(np.asarray(blocks)):
        # What is not selectable yet must not matter.
        k[row, :, layout.sink_tokens + 16 * count :] = 100 * rng.normal(size=1)
    prefix = branch_attention.make_prefix(jnp.asarray(k), jnp.asarray(k), layout)
    summaries, exponents = branch_attention.make_summaries(prefix, jnp.asarray(blocks))
    np.testing.assert_array_equal(exponents, cache.exponents[index])
    wanted = np.asarray(cache.summaries[index])
    first, at = 0, 0
    for granularity in GRANULARITIES_TOKENS:
        for row, count in enumerate(np.asarray(blocks)):
            units = -(-16 * int(count) // granularity)
            np.testing.assert_array_equal(
                np.asarray(summaries)[row, :, first : first + units],
                wanted[row, :, at : at + units],
            )
        first += prefix.lowest.shape[2] * 16 // granularity
        at += held_blocks(cache) * 16 // granularity


def held_blocks(cache) -> int:
    return cache.k[0].shape[2]


TOLERANCES = (0.02, 0.1, 0.4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_oracle_plans_what_brute_force_finds(seed):
    rng = np.random.default_rng(seed)
    layout = fx.KVLayout(1, 2, 8, dtype="float32", sink_tokens=16, recent_tokens=16)
    tokens, group = 311, 2
    size = branch_attention.padded_tokens(layout, tokens)
    q = 2 * rng.normal(size=(1, 4, 8)).astype(np.float32)
    k, v = (rng.normal(size=(2, tokens, 8)).astype(np.float32) for _ in range(2))
    k[:, 100:110] *= 3
    layer, positions = Captured(q, k, v, 0.5), np.array([tokens - 1])
    count = int(host_tokens(layout, tokens - 1))
    host = slice(16, 16 + count)
    attention = quality.full_attention(layer, positions, host)

    padded = [np.zeros((1, 2, size, 8), np.float32) for _ in range(2)]
    for target, x in zip(padded, (k, v), strict=True):
        target[0, :, : tokens - 1] = x[:, :-1]
    prefix = branch_attention.make_prefix(*map(jnp.asarray, padded), layout)
    branches = len(TOLERANCES)
    own = [np.repeat(x[None, None, :, -1:], branches, axis=1) for x in (k, v)]
    past = Past(*map(jnp.asarray, own), jnp.asarray(0), jnp.asarray([tokens - 1]))
    queries = jnp.asarray(np.repeat(q[:, None], branches, axis=1))
    scores = branch_attention.attention_scores(queries, prefix, past, 0.5)
    summaries, exponents = branch_attention.make_summaries(prefix, jnp.asarray([count // 16]))
    plan = oracle_plan(
        queries,
        jnp.asarray(TOLERANCES, jnp.float32),
        scores,
        branch_attention.resident(layout, past, size),
        prefix,
        past,
        summaries,
        exponents,
        layout,
    )
    budgets = np.zeros((branches, 4, 4), np.int64)
    for d, granularity in enumerate(GRANULARITIES_TOKENS):
        ranked = quality.unit_scores("integer", layer, attention, host, granularity, False)
        rungs = ladder((size - 16) // granularity)
        for e, tolerance in enumerate(TOLERANCES):
            for n in range(4):
                for rung in rungs:
                    chosen = quality.select(ranked, min(int(rung), ranked.shape[-1]))
                    _, error = quality.judge(chosen, layer, attention, host, granularity)
                    if rung >= ranked.shape[-1] or error[n // group, 0, n % group] <= tolerance:
                        budgets[e, d, n] = rung * granularity
                        break
    for e in range(branches):
        for head in range(2):
            own_budgets = budgets[e, :, group * head : group * (head + 1)]
            read = np.minimum(own_budgets.sum(axis=-1), count)
            units = np.asarray([-(-count // g) for g in GRANULARITIES_TOKENS]) * (read > 0)
            cost = read * 2 * 8 * 4 + units * 2 * 8
            best = max(d for d in range(4) if cost[d] == cost.min())
            assert plan.granularity[0, e, head] == GRANULARITIES_TOKENS[best]
            np.testing.assert_array_equal(
                plan.budget_tokens[0, e, group * head : group * (head + 1)], own_budgets[best]
            )
    assert len(np.unique(plan.budget_tokens)) > 3


@pytest.mark.slow
def test_the_oracle_reads_less_for_more_error():
    names = ("oracle:0.02", "oracle:0.3", "full")
    found = branched([parse_policy(p) for p in names], tiny.prompts(LENGTHS))
    strict, loose, _ = found.host_bytes_per_token
    assert 0 < loose < strict
    assert found.read_fraction[1] < found.read_fraction[0] <= found.read_fraction[2] == 1


@jax.tree_util.register_static
class Talkative:
    """Plans as `fixed:16:0.05`, and says more about it."""

    def plan(self, features, lengths):
        plan = parse_policy("fixed:16:0.05").plan(features, lengths)
        return plan._replace(clipped=plan.budget_tokens > 0, notes={"lengths": lengths})


def test_policies_that_say_more_than_others_go_beside_them(forked):
    policies = [parse_policy("full"), Talkative()]
    found = branched(policies, tiny.prompts(LENGTHS))
    expected = forked["fixed:16:0.05"]
    assert found.tokens[1] == [row.tolist() for row in expected.tokens]
    assert found.host_bytes_per_token[1] == expected.stats.host_bytes_per_token


def test_rungs_are_close_together():
    for units in (1, 7, 64, 1000):
        rungs = ladder(units)
        assert rungs[0] == 0
        assert rungs[-1] == units
        steps = np.diff(rungs)
        assert (steps >= 1).all()
        assert (steps <= np.maximum(1, rungs[:-1] / 4)).all()


@pytest.mark.slow
def test_sliding_windows_are_kept():
    model, prompts = tiny.gemma3(), tiny.prompts(LENGTHS)
    # The window slides over prompts and answers.
    assert 1 < model.config.sliding_window < NEW_TOKENS
    cache = tiny.prefilled(model, [p[:-1] for p in prompts])
    names = ("full", "fixed:16:0.05")
    found = run_branches(
        model,
        prompts,
        [parse_policy(name) for name in names],
        max_new_tokens=NEW_TOKENS,
        stop_tokens=(),
        layout=cache.layout,
        dense_below_tokens=0,
    )
    for v, name in enumerate(names):
        result = tiny.generate(
            model,
            [p[-1:] for p in prompts],
            policy=name,
            cache=cache.fork(),
            max_new_tokens=NEW_TOKENS,
        )
        assert [row.tolist() for row in result.tokens] == found.tokens[v], name
        assert found.host_bytes_per_token[v] == result.stats.host_bytes_per_token, name
        assert found.read_fraction[v] == pytest.approx(result.stats.read_fraction), name


def test_what_cannot_be_branched_is_refused():
    with pytest.raises(ConfigError, match="expected at most 256 new tokens"):
        branched([parse_policy("full")], [[1, 2]], max_new_tokens=257)
    with pytest.raises(UnsupportedError, match=r"got an oracle.*--shared-prefix"):
        tiny.generate(tiny.llama(), tiny.prompts(), policy="oracle:0.1", max_new_tokens=1)
    with pytest.raises(ConfigError, match=r"expected a number in 'oracle:x'"):
        parse_policy("oracle:x")
    with pytest.raises(ConfigError, match="expected a tolerance above 0, got 0"):
        parse_policy("oracle:0")


@pytest.mark.slow
class TestSketchedPolicies:
    """Policies that look at the sketch plan in a branch what they plan in the product."""

    # The last call of the second prompt's prefill has two tokens: fewer than there are probes.
    LENGTHS = (500, 387, 411)
    TOLERANCES = (0.05, 0.1, 0.2, 0.4)

    @staticmethod
    def prefilled(prompts, capacity_tokens=tiny.CAPACITY_TOKENS):
        cache = tiny.new_cache(tiny.llama(), max_tokens=capacity_tokens, sketch=True)
        rows = [p[:-1] for p in prompts]
        fx.prefill(tiny.llama(), rows, cache, chunk_tokens=tiny.CHUNK_TOKENS, progress=False)
        return cache

    @staticmethod
    def branched(policies, prompts, capacity_tokens=tiny.CAPACITY_TOKENS, **options):
        return branched(
            policies,
            prompts,
            layout=tiny.llama().config.kv_layout("float32", sketch=True),
            capacity_tokens=capacity_tokens,
            chunk_tokens=tiny.CHUNK_TOKENS,
            **options,
        )

    # The runs of the larger cache are of two blocks.
    @pytest.mark.parametrize("capacity_tokens", [tiny.CAPACITY_TOKENS, 8704])
    def test_they_answer_and_count_as_in_the_product(self, capacity_tokens):
        prompts = tiny.prompts(self.LENGTHS)
        cache = self.prefilled(prompts, capacity_tokens)
        policies = [random_policy().with_tolerance(t) for t in self.TOLERANCES]
        policies.insert(1, parse_policy("fixed:16:0.05"))
        found = self.branched(policies, prompts, capacity_tokens)
        for v, policy in enumerate(policies):
            result = tiny.generate(
                tiny.llama(),
                [p[-1:] for p in prompts],
                policy=policy,
                cache=cache.fork(),
                max_new_tokens=NEW_TOKENS,
            )
            assert found.tokens[v] == [row.tolist() for row in result.tokens], str(policy)
            assert found.host_bytes_per_token[v] == result.stats.host_bytes_per_token, str(policy)
        assert len(set(found.host_bytes_per_token)) == len(policies)

    @pytest.mark.parametrize("capacity_tokens", [tiny.CAPACITY_TOKENS, 8704])
    def test_their_sketch_is_that_of_the_cache(self, capacity_tokens):
        prompts = tiny.prompts(self.LENGTHS)
        cache = self.prefilled(prompts, capacity_tokens)
        model, layout = tiny.llama(), cache.layout
        lengths = jnp.asarray(cache.lengths)
        ids = np.zeros((3, branch_attention.padded_tokens(layout, 499)), np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt) - 1] = prompt[:-1]
        capacity = cache.num_host_blocks
        graph, params = nnx.split(model)
        layers = read_prefix(
            graph, params, jnp.asarray(ids), lengths, layout, capacity, tiny.CHUNK_TOKENS
        )
        blocks = host_tokens(layout, lengths) // 16
        for kept, (prefix, sketched) in zip(cache.sketch, layers, strict=True):
            runs = branch_sketch.runs(sketched, prefix, blocks, capacity)
            assert runs.shape == kept.runs.shape
            for row, count in enumerate(np.asarray(blocks)):
                reached = -(-int(count) // run_blocks(capacity))
                assert reached > 1
                np.testing.assert_allclose(
                    runs[row, :, :reached], kept.runs[row, :, :reached], atol=2e-5
                )
            before = branch_sketch.before_first(sketched, 1)
            past = Past(None, None, jnp.asarray(0), lengths)
            mine = branch_sketch.branch_sketch(
                sketched, runs, before.q[:, 0], before.window_lse[:, 0], past
            )
            for name in ("probe_q", "probes", "probe_position"):
                np.testing.assert_allclose(
                    getattr(mine, name), getattr(kept, name), atol=1e-4, err_msg=name
                )
            for row, length in enumerate(np.asarray(lengths)):
                slot = (length - 1) % 2
                for name in ("previous_q", "previous_lse", "previous_position"):
                    np.testing.assert_allclose(
                        getattr(mine, name)[row, slot],
                        getattr(kept, name)[row, slot],
                        atol=1e-4,
                        err_msg=name,
                    )

    def test_one_program_serves_all_their_tolerances(self):
        prompts = tiny.prompts(self.LENGTHS)
        self.branched([random_policy().with_tolerance(t) for t in (0.05, 0.4)], prompts)
        programs = compilations()
        self.branched([random_policy().with_tolerance(t) for t in (0.1, 0.3)], prompts)
        assert compilations() == programs

    def test_a_layout_without_a_sketch_is_refused(self):
        with pytest.raises(ConfigError, match="expected a cache that keeps a sketch"):
            branched([random_policy()], tiny.prompts(self.LENGTHS))
        with pytest.raises(ConfigError, match="expected a capacity of at least 539 tokens"):
            self.branched([random_policy()], tiny.prompts(self.LENGTHS), 512)
