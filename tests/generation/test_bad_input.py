"""What cannot be done is refused in words, and the cache stays as it was."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fluxion_jax as fx
import pallas_kernels
from fluxion_jax.cache.rebuild import rebuild_summaries
from fluxion_jax.policy import parse_split
from host_ops import native
from tests.generation import tiny

ROWS = tiny.prompts((5, 340, 400), seed=9)
REST = [[1], [2], [3]]
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def model():
    return tiny.llama()


@pytest.fixture(scope="module")
def cache(model):
    """Every test goes on with the same cache object: a refusal must not have touched it."""
    return tiny.prefilled(model, ROWS)


@pytest.fixture(scope="module")
def reference(model, cache):
    return tiny.generate(model, REST, cache=cache.fork(), max_new_tokens=NEW_TOKENS)


@pytest.fixture
def intact(model, cache, reference):
    """The cache; afterwards it still generates what an untouched copy of it does."""
    yield cache
    result = tiny.generate(model, REST, cache=cache.fork(), max_new_tokens=NEW_TOKENS)
    for got, expected in zip(result.tokens, reference.tokens, strict=True):
        np.testing.assert_array_equal(got, expected)


def refused(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_more_than_the_cache_holds(model, intact):
    # Row 2 has 400 tokens, is fed 200 - 1 more and the 42 first of 43 new ones.
    message = (
        "at most max_tokens=640 tokens .* got 642 in row 2 .400 cached and 242 new.; .* larger "
        "max_tokens or shorten"
    )
    prompts = tiny.prompts((1, 1, 200))
    refused(
        fx.CacheFullError,
        message,
        lambda: tiny.generate(model, prompts, cache=intact, max_new_tokens=43),
    )
    long = tiny.prompts((1, 1, 241))
    message = "got 641 in row 2 .400 cached and 241 new"
    refused(fx.CacheFullError, message, lambda: fx.prefill(model, long, intact))
    refused(
        fx.CacheFullError,
        message,
        lambda: fx.score(model, intact, np.zeros((3, 242), np.int32)),
    )


def test_the_cache_may_be_filled_to_the_brim(model, intact):
    brim = intact.fork()
    result = tiny.generate(model, REST, cache=brim, max_new_tokens=240)
    assert int(brim.lengths[2]) == 640
    assert len(result.tokens[2]) == 240
    refused(
        fx.CacheFullError,
        "got 641 in row 2",
        lambda: tiny.generate(model, REST, cache=brim, max_new_tokens=1),
    )


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], [], [3]], "at least one token in prompt 1, got an empty prompt"),
        ([], "at least one prompt, got none"),
        (np.zeros((0, 4), np.int32), "at least one prompt, got none"),
        ([[1], [2, -1], [3]], r"within \[0, 256\) in prompt 1, got \[-1\]; .* own tokenizer"),
        ([[1], [2], [3, 256, 999]], r"in prompt 2, got \[256, 999\]"),
        ([[1], [2**40], [3]], r"in prompt 1, got \[1099511627776\]"),
        ([[1.0], [2], [3]], "prompt 0 as a list of integer token ids, got float64; encode"),
        ([[True], [2], [3]], "prompt 0 as a list of integer token ids, got bool"),
        ([[1], [[2]], [3]], r"prompt 1 as a list .* got an array of shape \(1, 1\); pass one"),
        (
            [[1], [2, [3]], [3]],
            "prompt 1 as a list of integer .*, got lists of different lengths",
        ),
        (["a", "b", "c"], "prompt 0 as a list of integer token ids, got <U1; encode text"),
        ("abc", "prompt 0 as a list of integer token ids, got <U1"),
        ([[1], [2]], "expected 3 prompts for this cache, got 2"),
        ([1, 2, 3], "expected 3 prompts for this cache, got 1"),
    ],
)
def test_prompts_that_are_none(model, intact, prompts, message):
    refused(fx.ConfigError, message, lambda: tiny.generate(model, prompts, cache=intact))
    refused(fx.ConfigError, message, lambda: fx.prefill(model, prompts, intact))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((3, 1), int), r"shape \[3, at least 2\], got \[3, 1\]"),
        (np.zeros((2, 5), int), r"shape \[3, at least 2\], got \[2, 5\]"),
        (np.zeros(5, int), r"shape \[3, at least 2\], got \[5\]"),
        ([[1, 2], [3, -4], [5, 6]], r"in the tokens to score, got \[-4\]"),
        ([[1, 2], [3, 4], [5, 256]], r"in the tokens to score, got \[256\]"),
        ([[-7, 2], [3, 4], [5, 6]], r"in the tokens to score, got \[-7\]"),
        ([[1, 2], [3, 2**32 + 4], [5, 6]], r"in the tokens to score, got \[4294967300\]"),
        ([[1, 2], [3, 4.5], [5, 6]], "integer token ids to score in each row, got float64"),
        ([[1, 2], [3], [5, 6]], "as many integer .* in each row, got lists of different lengths"),
    ],
)
def test_tokens_that_cannot_be_scored(model, intact, tokens, message):
    refused(fx.ConfigError, message, lambda: fx.score(model, intact, tokens))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "integer max_new_tokens >= 1, got 0"),
        ({"max_new_tokens": -3}, "integer max_new_tokens >= 1, got -3"),
        ({"max_new_tokens": 1.5}, "integer max_new_tokens >= 1, got 1.5"),
        ({"max_new_tokens": True}, "integer max_new_tokens >= 1, got True"),
        ({"chunk_tokens": 0}, "integer chunk_tokens >= 1, got 0"),
        ({"chunk_tokens": 1.5}, "integer chunk_tokens >= 1, got 1.5"),
        ({"split": 1.5}, r"host fraction in \[0, 1\], got 1.5"),
        ({"split": -0.1}, r"host fraction in \[0, 1\], got -0.1"),
        ({"split": "nan"}, r"host fraction in \[0, 1\], got nan"),
        (
            {"split": "cpu"},
            r"'adaptive', 'adaptive:FILE' or a host fraction in \[0, 1\], got 'cpu'",
        ),
        ({"policy": 5}, "policy name or an object with a plan method, got int"),
        ({"stop_tokens": [1, 2**40]}, r"below 2\*\*31 as stop_tokens, got \[1099511627776\]; are"),
        ({"stop_tokens": [-(2**31) - 1]}, r"as stop_tokens, got \[-2147483649\]"),
    ],
)
def test_options_out_of_range(model, intact, options, message):
    refused(fx.ConfigError, message, lambda: tiny.generate(model, REST, cache=intact, **options))


@pytest.mark.parametrize(
    "policy",
    [
        "",
        "Full",
        "full:16",
        "fixed",
        "fixed:16",
        "fixed::",
        "fixed:16:",
        "fixed:16:five",
        "fixed:16.5:0.05",
        "fixed:17:0.05",
        "fixed:256:0.05",
        "fixed:-16:0.05",
        "fixed:16:0",
        "fixed:16:-0.05",
        "fixed:16:1.5",
        "fixed:16:nan",
        "fixed:16:inf",
        "fixed:16:0.05:groups",
        "fixed:16:0.05:group:group",
        "quest:16:0.05",
    ],
)
def test_policies_that_are_none(model, intact, policy):
    message = r"expected .*(fixed:GRANULARITY:FRACTION|granularity of|budget fraction in)"
    refused(
        fx.ConfigError, message, lambda: tiny.generate(model, REST, cache=intact, policy=policy)
    )


@pytest.mark.parametrize("policy", ["full", "fixed:16:0.05", "fixed:32:0.02:group"])
def test_policies_print_as_they_are_written(policy):
    assert str(fx.parse_policy(policy)) == policy


def test_a_cache_of_another_model(model):
    layout = fx.KVLayout(2, 3, 64, dtype="float32")
    refused(
        fx.ConfigError,
        "cache with num_kv_heads=2 like the model, got 3; allocate it with model.config.kv_layout",
        lambda: tiny.generate(model, REST, cache=fx.HostKV.allocate(layout, 3, 640)),
    )
    layout = fx.KVLayout(4, 2, 64, dtype="float32")
    refused(
        fx.ConfigError,
        "num_layers=2 like the model, got 4",
        lambda: fx.prefill(model, REST, fx.HostKV.allocate(layout, 3, 640)),
    )


@pytest.mark.parametrize(("num_heads", "fits"), [(None, True), (6, True), (4, False)])
def test_a_cache_of_a_model_with_other_query_heads(model, num_heads, fits):
    layout = fx.KVLayout(2, 2, 64, dtype="float32", num_heads=num_heads)
    new = fx.HostKV.allocate(layout, 3, tiny.CAPACITY_TOKENS)
    if fits:
        fx.prefill(model, REST, new, progress=False)
        return
    message = "num_heads=6 like the model, got 4; allocate it with model.config.kv_layout"
    refused(fx.ConfigError, message, lambda: fx.prefill(model, REST, new))


def decode(cache, q, k_new, v_new, layer=0):
    return fx.decode_attention(
        jnp.zeros(q),
        jnp.zeros(k_new),
        jnp.zeros(v_new),
        cache,
        layer,
        fx.full(),
        scale=1.0,
        split=fx.policy.one_sided("host"),
    )


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3, 6, 64), (3, 3, 64), (3, 2, 64)), r"k_new of shape .* \(3, 2, 64\), got \(3, 3, 64\)"),
        (((3, 6, 64), (3, 2, 64), (3, 2, 32)), r"v_new of shape .* \(3, 2, 64\), got \(3, 2, 32\)"),
        (((3, 5, 64), (3, 2, 64), (3, 2, 64)), r"multiple of 2 query heads .* got 5"),
        (((2, 6, 64), (3, 2, 64), (3, 2, 64)), r"q of shape .* \(3, N, 64\), got \(2, 6, 64\)"),
        (((3, 6, 1, 64), (3, 2, 64), (3, 2, 64)), r"got \(3, 6, 1, 64\)"),
    ],
)
def test_wrong_heads_in_decode_attention(intact, shapes, message):
    refused(fx.ConfigError, message, lambda: decode(intact, *shapes))


def test_a_layer_that_is_none(intact):
    shapes = (3, 6, 64), (3, 2, 64), (3, 2, 64)
    refused(fx.ConfigError, "a global layer, .* got 2", lambda: decode(intact, *shapes, layer=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 1}, "expected 2 layers of keys and values, got 1 and 2"),
        ({"heads": 3}, r"k\[0\] of shape .* \(2, 5, 2, 16\), got \(2, 5, 3, 16\)"),
        ({"lengths": [6, 1]}, r"2 lengths within \[0, 5\], got \[6, 1\]"),
        ({"lengths": [-1, 1]}, r"2 lengths within \[0, 5\], got \[-1, 1\]"),
        ({"lengths": [1]}, r"2 lengths within \[0, 5\], got \[1\]"),
        ({"max_tokens": 3}, "at most max_tokens=3 tokens .* got 5 in row 0"),
    ],
)
def test_wrong_arrays(change, message):
    layout = fx.KVLayout(2, 2, 16, dtype="float32")
    array = np.zeros((2, 5, change.get("heads", 2), 16), np.float32)
    with pytest.raises(fx.FluxionError, match=message):
        fx.HostKV.from_arrays(
            layout,
            [array] * change.get("k", 2),
            [array] * 2,
            change.get("lengths", [5, 4]),
            max_tokens=change.get("max_tokens", 8),
        )


@pytest.mark.parametrize("options", [{"host": "cuda"}, {"device": ["xla", "cuda"]}, {"host": ()}])
def test_an_unknown_implementation(options):
    with pytest.raises(fx.ConfigError, match="to be None or out of"):
        fx.Execution(**options)


def test_a_sequence_of_implementations_can_be_part_of_a_program():
    assert hash(fx.Execution(host=["native", "xla"])) == hash(fx.Execution(host=("native", "xla")))


def test_a_consumed_cache_is_refused(model, intact, tmp_path):
    consumed = intact.fork()
    decode(consumed, (3, 6, 64), (3, 2, 64), (3, 2, 64))
    for call in (
        lambda: tiny.generate(model, REST, cache=consumed),
        lambda: fx.prefill(model, REST, consumed),
        lambda: fx.score(model, consumed, [[1, 2]] * 3),
        lambda: fx.jit(lambda cache: cache.advance())(consumed),
        lambda: consumed.save(tmp_path / "consumed"),
        lambda: consumed.require_room(1),
        lambda: consumed.host_len,
        lambda: consumed.has_room(1),
        lambda: consumed.advance(),
        lambda: consumed.note_non_finite(jnp.zeros((3, 1)), jnp.ones(3, bool)),
        lambda: consumed.reset([0]),
        lambda: consumed.fork(),
        lambda: consumed.check(),
        lambda: consumed.clear_status(),
        lambda: consumed.at_home(),
    ):
        refused(fx.FluxionError, "one that a compiled program consumed; go on with", call)


def test_a_pending_error_is_refused_at_once(model, intact):
    pending = intact.fork()
    pending.status = jnp.asarray([8], jnp.int32)
    message = re.compile("without a pending error, got: .*native operation failed.*clear_status")
    for call in (
        lambda: tiny.generate(model, REST, cache=pending),
        lambda: fx.prefill(model, REST, pending),
        lambda: fx.score(model, pending, [[1, 2]] * 3),
    ):
        refused(fx.FluxionError, message, call)
    for name in ("k", "v", "summaries", "exponents", "window_k", "window_v", "lengths"):
        held = jax.tree.leaves(getattr(pending, name)), jax.tree.leaves(getattr(intact, name))
        for got, expected in zip(*held, strict=True):
            np.testing.assert_array_equal(got, expected)


def test_an_implementation_that_cannot_be_used(model, intact, monkeypatch):
    """What a leaf package refuses comes as an error of this one, from every way in."""
    q, k = jnp.zeros((3, 4, 64)), jnp.zeros((3, 2, 64))
    step = {"scale": 1.0, "split": parse_split("device")}

    def refuse(*args, **kwargs):
        raise pallas_kernels.UnsupportedImplementationError("triton: too old")

    monkeypatch.setattr(pallas_kernels, "share_attention", refuse)
    refused(
        fx.UnsupportedError,
        "triton: too old",
        lambda: fx.decode_attention(q, k, k, intact.fork(), 0, fx.full(), **step),
    )
    monkeypatch.setattr(native, "unavailable_reason", lambda: "it was not built")
    execution = fx.Execution(host="native")
    for call in (
        lambda: tiny.generate(model, REST, cache=intact, execution=execution),
        lambda: rebuild_summaries(intact.fork(), "native"),
    ):
        refused(fx.UnsupportedError, "native: it was not built", call)
