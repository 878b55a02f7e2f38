"""However tokens come into the cache, the cache is the same."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

import fluxion_jax as fx
from tests.generation import tiny

LENGTHS = (9, 350, 470)
SINKS, RECENT, RING, BLOCK = 64, 256, 272, 16


class Row(NamedTuple):
    """What one row of one layer holds, in the order of the sequence."""

    tokens: np.ndarray  # [2, K, n, H], keys and values
    summaries: list[np.ndarray]  # per granularity [K, units, 2, H]
    exponents: np.ndarray  # [K, H]


def host_tokens(length: int) -> int:
    return BLOCK * max(0, (length - SINKS - RECENT) // BLOCK)


def content(cache: fx.HostKV, layer: int, row: int) -> Row:
    n = int(cache.lengths[row])
    on_host = host_tokens(n)
    parts = []
    for blocks, window in ((cache.k, cache.window_k), (cache.v, cache.window_v)):
        host, resident = np.asarray(blocks[layer][row]), np.asarray(window[layer][row])
        heads, capacity, _, size = host.shape
        stream = SINKS + np.arange(on_host, max(on_host, n - SINKS)) % RING
        parts.append(
            np.concatenate(
                [
                    resident[:, : min(n, SINKS)],
                    host.reshape(heads, capacity * BLOCK, size)[:, :on_host],
                    resident[:, stream],
                ],
                axis=1,
            )
        )
    units = np.asarray(cache.summaries[layer][row])
    capacity = cache.k[layer].shape[2]
    summaries, offset = [], 0
    for span in (1, 2, 4, 8):
        summaries.append(units[:, offset : offset + -(-on_host // BLOCK // span)])
        offset += capacity // span
    return Row(np.stack(parts), summaries, np.asarray(cache.exponents[layer][row]))


def summaries_of(keys: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Summaries and exponents of host keys `[K, S, H]`, written down from their definition."""
    largest = np.abs(keys).max(axis=1, initial=0.0).astype(np.float64)
    exponents = np.full(largest.shape, -60)
    for e in range(60, -61, -1):
        exponents[(largest <= 127 * 2.0**e)] = e
    scaled = keys / 2.0 ** exponents[:, None]
    levels = []
    for span in (16, 32, 64, 128):
        units = [scaled[:, i : i + span] for i in range(0, keys.shape[1], span)]
        bounds = [np.stack([np.floor(u.min(1)), np.ceil(u.max(1))], axis=1) for u in units]
        empty = np.zeros((keys.shape[0], 0, 2, keys.shape[2]))
        levels.append(np.stack(bounds, axis=1) if bounds else empty)
    return levels, exponents


def assert_same(got: fx.HostKV, expected: fx.HostKV) -> None:
    np.testing.assert_array_equal(got.lengths, expected.lengths)
    for layer in range(len(got.k)):
        for row in range(got.batch):
            have, want = content(got, layer, row), content(expected, layer, row)
            assert have.tokens.shape[2] == int(got.lengths[row])
            np.testing.assert_allclose(have.tokens, want.tokens, atol=1e-5)
            keys = have.tokens[0, :, SINKS : SINKS + host_tokens(int(got.lengths[row]))]
            summaries, exponents = summaries_of(keys)
            np.testing.assert_array_equal(have.exponents, exponents)
            for mine, true in zip(have.summaries, summaries, strict=True):
                np.testing.assert_array_equal(mine, true)


@pytest.fixture(scope="module")
def rows():
    return tiny.prompts(LENGTHS, seed=3)


@pytest.fixture(scope="module")
def at_once(rows):
    cache = tiny.new_cache(tiny.llama())
    logits = fx.prefill(tiny.llama(), rows, cache, chunk_tokens=512, progress=False)
    return cache, logits


def test_chunks_give_what_one_chunk_gives(rows, at_once):
    cache = tiny.new_cache(tiny.llama())
    logits = fx.prefill(tiny.llama(), rows, cache, chunk_tokens=128, progress=False)
    assert_same(cache, at_once[0])
    np.testing.assert_allclose(logits, at_once[1], atol=1e-4)


def test_prefill_returns_the_logits_behind_each_row(rows, at_once):
    dense = tiny.dense_log_probs(tiny.llama(), rows)
    logits = at_once[1]
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    for row in range(3):
        np.testing.assert_allclose(log_probs[row], dense[row][-1], atol=1e-4)


def test_two_turns_give_what_one_turn_gives(rows, at_once):
    """Cut off the grid of blocks and of chunks, inside the sinks in row 0."""
    cache = tiny.new_cache(tiny.llama())
    cuts = (5, 333, 149)
    first = [row[:cut] for row, cut in zip(rows, cuts, strict=True)]
    rest = [row[cut:] for row, cut in zip(rows, cuts, strict=True)]
    fx.prefill(tiny.llama(), first, cache, chunk_tokens=128, progress=False)
    logits = fx.prefill(tiny.llama(), rest, cache, chunk_tokens=128, progress=False)
    assert_same(cache, at_once[0])
    np.testing.assert_allclose(logits, at_once[1], atol=1e-4)


def test_decoding_token_by_token_gives_what_prefill_gives():
    model = tiny.llama()
    tokens = np.asarray(tiny.prompts((401,) * 3, seed=4))
    expected = tiny.prefilled(model, tokens[:, :-1].tolist())
    cache = tiny.new_cache(model)
    scores = fx.score(model, cache, tokens, execution=tiny.ALWAYS_SPARSE, progress=False)
    assert_same(cache, expected)
    dense = np.stack(tiny.dense_log_probs(model, tokens.tolist()))[:, :-1]
    given = np.take_along_axis(dense, tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(scores.log_probs, given, atol=1e-4)


def test_sliding_layers_do_not_depend_on_the_chunks():
    model, rows = tiny.gemma3(), tiny.prompts(LENGTHS, seed=3)
    first = [row[:7] for row in rows]
    cache = tiny.prefilled(model, first)
    logits = fx.prefill(model, [row[7:] for row in rows], cache, chunk_tokens=128, progress=False)
    expected = tiny.new_cache(model)
    at_once = fx.prefill(model, rows, expected, chunk_tokens=128, progress=False)
    np.testing.assert_allclose(logits, at_once, atol=1e-4)
    for got, want in zip(cache.sliding_k, expected.sliding_k, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    assert_same(cache, expected)
