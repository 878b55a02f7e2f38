"""The decoder through the cache against its dense path, and the small things around it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fluxion_jax
from fluxion_jax import HostKV
from fluxion_jax.models import Decoder, ModelConfig
from fluxion_jax.policy.split import split_at

CONFIGS = {"llama": ModelConfig.tiny_llama(), "gemma3": ModelConfig.tiny_gemma3()}


@pytest.mark.parametrize("name", CONFIGS)
def test_prefill_and_decode_give_the_logits_of_the_dense_path(name: str) -> None:
    config = CONFIGS[name]
    model = Decoder.random(config, 1)
    graph, params = nnx.split(model)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (3, 480))
    prompt = np.array([470, 33, 401])
    steps = 6

    @fluxion_jax.jit
    def prefill(params, ids, count, cache):
        return nnx.merge(graph, params).prefill_chunk(ids, count, cache)

    @fluxion_jax.jit
    def decode(params, ids, cache, policy, split):
        return nnx.merge(graph, params).decode_step(ids, cache, policy, split=split)

    dense = np.asarray(nnx.jit(lambda m, t: m(t))(model, jnp.asarray(tokens)))
    cache = HostKV.allocate(config.kv_layout("float32"), 3, 640)
    logits = np.zeros((3, config.vocab_size), np.float32)
    for start in range(0, 480, 160):
        count = np.clip(prompt - start, 0, 160)
        chunk_logits, cache = prefill(
            params, jnp.asarray(tokens[:, start : start + 160]), jnp.asarray(count), cache
        )
        logits = np.where((count > 0)[:, None], np.asarray(chunk_logits), logits)
    np.testing.assert_array_equal(cache.lengths, prompt)
    rows = np.arange(3)
    np.testing.assert_allclose(logits, dense[rows, prompt - 1], rtol=0, atol=1e-3)

    policy, split = fluxion_jax.full(), split_at(0.5)
    for step in range(steps):
        at = prompt + step
        logits, cache, stats = decode(params, jnp.asarray(tokens[rows, at]), cache, policy, split)
        np.testing.assert_array_equal(cache.lengths, at + 1)
        np.testing.assert_allclose(logits, dense[rows, at], rtol=0, atol=1e-3)
    cache.check()
    global_layers = config.num_layers - len(config.sliding_layers)
    assert {x.shape[0] for x in jax.tree.leaves(stats)} == {global_layers}


def test_a_model_without_global_layers_has_no_statistics() -> None:
    import dataclasses

    config = dataclasses.replace(ModelConfig.tiny_gemma3(), sliding_layers=(0, 1, 2, 3))
    model = Decoder.random(config)
    cache = HostKV.allocate(config.kv_layout("float32"), 1, 64)
    tokens = jnp.array([[5, 6, 7]])
    graph, params = nnx.split(model)

    @fluxion_jax.jit
    def decode(params, ids, cache, policy, split):
        return nnx.merge(graph, params).decode_step(ids, cache, policy, split=split)

    for step in range(3):
        logits, cache, stats = decode(
            params, tokens[:, step], cache, fluxion_jax.full(), split_at(1.0)
        )
    assert stats is None
    np.testing.assert_allclose(logits, model(tokens)[:, -1], rtol=0, atol=1e-4)


def test_the_seed_decides_the_weights() -> None:
    first, again, other = (Decoder.random(CONFIGS["llama"], seed) for seed in (3, 3, 4))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, nnx.state(first), nnx.state(again)))
    assert not jnp.array_equal(first.embedding[...], other.embedding[...])


def test_untied_models_have_an_output_table_of_their_own() -> None:
    import dataclasses

    model = Decoder.random(dataclasses.replace(CONFIGS["llama"], tied_embeddings=False))
    assert model.output[...].shape == model.embedding[...].shape
    assert not jnp.array_equal(model.output[...], model.embedding[...])


def test_gemma_rounds_the_scale_of_its_embeddings_first() -> None:
    """sqrt(48) is 6.928, and 6.9375 in bfloat16; the products show which one was used."""
    model = Decoder.random(CONFIGS["gemma3"], dtype=jnp.bfloat16)
    model.embedding[...] = jnp.ones_like(model.embedding[...])
    assert float(model._embed(jnp.array([[0]]))[0, 0, 0]) == 6.9375
