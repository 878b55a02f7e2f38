"""Rows of a batch: they end on their own, and what has ended is left alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fluxion_jax as fx
from fluxion_jax.models import LoadedModel
from tests.generation import tiny


@pytest.fixture(scope="module")
def reference():
    return tiny.generate(tiny.llama(), tiny.prompts(), max_new_tokens=70)


def row_bytes(cache: fx.HostKV, row: int) -> list[bytes]:
    arrays = [*cache.k, *cache.v, *cache.summaries, *cache.exponents]
    arrays += [*cache.window_k, *cache.window_v]
    return [np.asarray(x[row]).tobytes() for x in arrays]


def first_of(tokens: np.ndarray, *stops: int) -> int:
    return int(np.argmax(np.isin(tokens, stops)))


def test_a_stop_token_ends_its_row_only(reference):
    stop = int(reference.tokens[0][3])
    result = tiny.generate(tiny.llama(), tiny.prompts(), max_new_tokens=70, stop_tokens=(stop,))
    assert len(result.tokens[0]) <= 4
    for row, (got, expected) in enumerate(zip(result.tokens, reference.tokens, strict=True)):
        length = first_of(expected, stop) + 1 if stop in expected else 70
        np.testing.assert_array_equal(got, expected[:length])
        np.testing.assert_allclose(
            result.log_probs[row], reference.log_probs[row][:length], atol=1e-5
        )
        # All tokens but the last have been fed.
        assert int(result.cache.lengths[row]) == tiny.LENGTHS[row] + length - 1


def test_generation_ends_when_every_row_has(reference):
    stops = [int(tokens[5]) for tokens in reference.tokens]
    result = tiny.generate(tiny.llama(), tiny.prompts(), max_new_tokens=70, stop_tokens=stops)
    lengths = [first_of(tokens, *stops) + 1 for tokens in reference.tokens]
    assert [len(tokens) for tokens in result.tokens] == lengths
    assert result.stats.num_steps == max(lengths)
    assert result.stats.num_tokens == sum(lengths)


def test_a_finished_row_stays_as_it_is(reference):
    """Its cache is that of a generation that ended there, bit for bit."""
    stop = int(reference.tokens[1][4])
    length = first_of(reference.tokens[1], stop) + 1
    ended = tiny.generate(tiny.llama(), tiny.prompts(), max_new_tokens=70, stop_tokens=(stop,))
    short = tiny.generate(tiny.llama(), tiny.prompts(), max_new_tokens=length)
    assert len(ended.tokens[1]) == length
    assert row_bytes(ended.cache, 1) == row_bytes(short.cache, 1)


def test_an_inactive_row_takes_no_part(reference):
    rows = tiny.prompts()
    cache = tiny.prefilled(tiny.llama(), [row[:-1] for row in rows])
    cache.active = jnp.asarray([True, False, True])
    before = row_bytes(cache, 1)
    stop = int(reference.tokens[0][69])
    result = tiny.generate(
        tiny.llama(),
        [[row[-1]] for row in rows],
        cache=cache,
        max_new_tokens=70,
        stop_tokens=(stop, int(reference.tokens[2][69])),
    )
    assert len(result.tokens[1]) == 0
    assert len(result.log_probs[1]) == 0
    for row in (0, 2):
        length = len(result.tokens[row])
        np.testing.assert_array_equal(result.tokens[row], reference.tokens[row][:length])
        assert length
    np.testing.assert_array_equal(cache.active, [True, False, True])
    assert row_bytes(cache, 1) == before
    assert int(cache.lengths[1]) == tiny.LENGTHS[1] - 1


def test_prefill_leaves_an_inactive_row_alone():
    cache = tiny.prefilled(tiny.llama(), tiny.prompts())
    cache.active = jnp.asarray([True, False, True])
    before = row_bytes(cache, 1)
    fx.prefill(tiny.llama(), tiny.prompts((40, 40, 40)), cache, chunk_tokens=128, progress=False)
    assert row_bytes(cache, 1) == before
    np.testing.assert_array_equal(cache.lengths, [49, 345, 540])


def test_a_batch_of_inactive_rows_ends_at_once():
    cache = tiny.prefilled(tiny.llama(), tiny.prompts())
    cache.active = jnp.zeros(3, bool)
    result = tiny.generate(tiny.llama(), tiny.prompts((1, 1, 1)), cache=cache, max_new_tokens=40)
    assert [len(tokens) for tokens in result.tokens] == [0, 0, 0]
    assert result.stats.num_tokens == 0


@pytest.mark.parametrize("count", [1, 31, 32, 33])
def test_the_last_chunk_may_be_short(reference, count):
    result = tiny.generate(tiny.llama(), tiny.prompts(), max_new_tokens=count)
    for got, expected in zip(result.tokens, reference.tokens, strict=True):
        np.testing.assert_array_equal(got, expected[:count])
    np.testing.assert_array_equal(result.cache.lengths, np.add(tiny.LENGTHS, count - 1))
    assert result.stats.num_steps == count
    assert result.stats.num_tokens == 3 * count


def test_a_stream_yields_the_tokens_of_generate(reference):
    steps = list(
        fx.stream(
            tiny.llama(),
            tiny.prompts(),
            cache=tiny.new_cache(tiny.llama()),
            max_new_tokens=70,
            execution=tiny.ALWAYS_SPARSE,
            chunk_tokens=tiny.CHUNK_TOKENS,
        )
    )
    assert len(steps) == 70
    assert steps[0].tokens.shape == (3,)
    np.testing.assert_array_equal([s.tokens for s in steps], np.stack(reference.tokens, axis=1))
    np.testing.assert_allclose(
        [s.log_probs for s in steps], np.stack(reference.log_probs, axis=1), atol=1e-5
    )


def test_a_stream_may_be_left_early(reference):
    rows, cache = tiny.prompts(), tiny.new_cache(tiny.llama())
    steps = fx.stream(
        tiny.llama(),
        rows,
        cache=cache,
        max_new_tokens=70,
        execution=tiny.ALWAYS_SPARSE,
        chunk_tokens=tiny.CHUNK_TOKENS,
    )
    next(steps)
    steps.close()
    assert int(cache.cancel[0]) == 0
    tiny.assert_continues(tiny.llama(), cache, rows, reference)


def test_the_cache_names_no_cancel_word_afterwards(reference):
    """A released word would be refused by the next step, or be somebody else's."""
    assert int(reference.cache.cancel[0]) == 0


def test_two_streams_on_one_cache_are_noticed(reference):
    cache = tiny.prefilled(tiny.llama(), tiny.prompts())
    options = {"cache": cache, "max_new_tokens": 40, "execution": tiny.ALWAYS_SPARSE}
    first = fx.stream(tiny.llama(), [[1], [2], [3]], **options)
    for _ in range(32):
        next(first)
    list(fx.stream(tiny.llama(), [[4], [5], [6]], **options))
    with pytest.raises(fx.FluxionError, match=r"got one that was used meanwhile; .* cache.fork"):
        next(first)


def test_two_streams_on_two_caches_do_not_meet(reference):
    options = {
        "max_new_tokens": 70,
        "execution": tiny.ALWAYS_SPARSE,
        "chunk_tokens": tiny.CHUNK_TOKENS,
    }
    both = [
        fx.stream(tiny.llama(), tiny.prompts(), cache=tiny.new_cache(tiny.llama()), **options)
        for _ in range(2)
    ]
    for pair, expected in zip(
        zip(*both, strict=True), np.stack(reference.tokens, axis=1), strict=True
    ):
        for step in pair:
            np.testing.assert_array_equal(step.tokens, expected)


def test_one_prompt_may_come_as_a_plain_list():
    """And a model as `load_model` returns it; the cache is then of the size needed, rounded up."""
    loaded = LoadedModel(tiny.llama(), None, tiny.llama().config, "tiny")
    assert fx.generate(loaded, [5], max_new_tokens=1).cache.max_tokens == 128


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray, tuple])
def test_prompts_may_be_arrays(convert):
    rows = tiny.prompts((4, 4, 4))
    expected = tiny.generate(tiny.llama(), rows, max_new_tokens=2)
    got = tiny.generate(tiny.llama(), convert(rows), max_new_tokens=2)
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool((a == b).all()), got.tokens, expected.tokens)
    )
