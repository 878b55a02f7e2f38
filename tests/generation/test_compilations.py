"""One program per shape: policies, sampling, seeds, stop tokens and prompts are data."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

import fluxion_jax as fx
from fluxion_jax.decode import decode_chunk, prefill_chunk
from fluxion_jax.models.config import ModelConfig
from fluxion_jax.models.decoder import Decoder
from fluxion_jax.policy import split_at
from tests.generation import tiny


def counts() -> tuple[int, int]:
    return prefill_chunk.compilations(), decode_chunk.compilations()


@pytest.fixture(scope="module")
def model() -> Decoder:
    """A shape that no other test has; one layer, because compiling takes most of the time."""
    return Decoder.random(dataclasses.replace(ModelConfig.tiny_llama(), num_layers=1), 0)


def test_one_compilation_per_generation(model):
    rows = tiny.prompts((400, 20))
    cache = tiny.new_cache(model, batch=2)

    def generate(rows, **options):
        cache.adopt(cache.reset())
        return fx.generate(
            model,
            rows,
            cache=cache,
            chunk_tokens=64,
            progress=False,
            **{"split": split_at(0.5), "max_new_tokens": 40, **options},
        )

    prefills, decodes = counts()
    first = generate(rows, policy="fixed:16:0.05")
    assert counts() == (prefills + 1, decodes + 1)
    assert first.stats.compile_s > 0
    for options in (
        {"policy": "fixed:32:0.02:group"},
        {"policy": "full"},
        {"policy": "full", "sampling": fx.top_p(0.9, temperature=0.7), "seed": 5},
        {"policy": "full", "split": 0.25, "max_new_tokens": 3},
        {"policy": "full", "split": 0.0, "stop_tokens": (1, 2, 3)},
    ):
        generate(rows, **options)
    generate(tiny.prompts((33, 500)))
    fx.score(model, cache.fork(), np.ones((2, 5), int), split=0.5, progress=False)
    cache.adopt(cache.reset())
    fx.prefill(model, rows, cache, chunk_tokens=64, progress=False)
    assert counts() == (prefills + 1, decodes + 1)


def test_a_cache_made_on_the_way_is_rounded_so_that_it_can_be_shared(model):
    prefills, decodes = counts()
    for length in (1, 60, 100):
        result = fx.generate(model, [5] * length, max_new_tokens=20, progress=False)
        assert result.cache.max_tokens == 128
    assert counts() == (prefills + 1, decodes + 1)


class Constant:
    """A compile-time constant that takes note of when it is hashed."""

    def __init__(self, tokens):
        self.tokens, self.hashed = tokens, 0

    def __hash__(self):
        self.hashed += 1
        return hash(self.tokens)

    def __eq__(self, other):
        return self.tokens == other.tokens


def test_a_constant_is_hashed_for_its_first_call_only():
    @functools.partial(fx.jit, static_argnames=("constant",))
    def count(cache, constant):
        return cache.advance(constant.tokens)

    cache = fx.HostKV.allocate(fx.KVLayout(1, 2, 64), batch=1, max_tokens=512)
    constant, equal, other = Constant(3), Constant(3), Constant(4)
    cache = count(cache, constant)
    hashed = constant.hashed
    for _ in range(3):
        cache = count(cache, constant)
    assert constant.hashed == hashed
    cache = count(count(cache, equal), other)
    assert int(cache.lengths[0]) == 19
    assert count.compilations() == 2
