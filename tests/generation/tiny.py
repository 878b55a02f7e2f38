"""Tiny models and one shape for all tests of this folder, so that they share compiled programs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import fluxion_jax as fx
from fluxion_jax.models.config import ModelConfig
from fluxion_jax.models.decoder import Decoder
from fluxion_jax.policy import parse_policy
from fluxion_jax.policy.protocol import needs_sketch

BATCH = 3
CAPACITY_TOKENS = 640
CHUNK_TOKENS = 128
# Longer than the resident window, so that selecting and measuring have something to do.
LENGTHS = (9, 345, 500)
ALWAYS_SPARSE = fx.Execution(dense_below_tokens=0)


@functools.cache
def llama(seed: int = 0) -> Decoder:
    return Decoder.random(ModelConfig.tiny_llama(), seed)


@functools.cache
def gemma3(seed: int = 0) -> Decoder:
    return Decoder.random(ModelConfig.tiny_gemma3(), seed)


def new_cache(
    model: Decoder, batch: int = BATCH, max_tokens: int = CAPACITY_TOKENS, *, sketch: bool = False
) -> fx.HostKV:
    return fx.HostKV.allocate(model.config.kv_layout("float32", sketch=sketch), batch, max_tokens)


def prompts(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, n).tolist() for n in lengths]


def generate(model: Decoder, rows: Any, **options: Any) -> fx.Result:
    options.setdefault("cache", None)
    if options["cache"] is None:
        sketch = needs_sketch(parse_policy(options.get("policy", "full"), model))
        options["cache"] = new_cache(model, sketch=sketch)
    defaults = {"execution": ALWAYS_SPARSE, "chunk_tokens": CHUNK_TOKENS, "progress": False}
    return fx.generate(model, rows, **{**defaults, **options})


def prefilled(model: Decoder, rows: list[list[int]], chunk_tokens: int = CHUNK_TOKENS) -> fx.HostKV:
    cache = new_cache(model)
    fx.prefill(model, rows, cache, chunk_tokens=chunk_tokens, progress=False)
    return cache


@functools.cache
def _dense() -> Any:
    return nnx.jit(lambda model, tokens, lengths: model(tokens, lengths))


def dense_log_probs(model: Decoder, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Per row float32 `[len(row), V]` of the model without any cache."""
    tokens = np.zeros((BATCH, CAPACITY_TOKENS), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    lengths = jnp.asarray([len(row) for row in rows], jnp.int32)
    logits = _dense()(model, jnp.asarray(tokens), lengths)
    log_probs = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    return [log_probs[i, : len(row)] for i, row in enumerate(rows)]


def assert_continues(
    model: Decoder, cache: fx.HostKV, rows: list[list[int]], reference: fx.Result, **options: Any
) -> None:
    """Going on behind what the cache holds of a generation gives the rest of that generation."""
    lengths = np.asarray(cache.lengths)
    fed = [int(n) - (len(row) - 1) for n, row in zip(lengths, rows, strict=True)]
    assert len(set(fed)) == 1, f"rows lost step with each other: {fed}"
    done = fed[0]
    if done < 0:
        following = [row[int(n) :] for n, row in zip(lengths, rows, strict=True)]
    elif done == 0:
        following = [row[-1:] for row in rows]
    else:
        following = [tokens[done - 1 : done].tolist() for tokens in reference.tokens]
    total = len(reference.tokens[0])
    rest = generate(model, following, cache=cache, max_new_tokens=total - max(done, 0), **options)
    for got, expected in zip(rest.tokens, reference.tokens, strict=True):
        np.testing.assert_array_equal(got, expected[max(done, 0) :])
