"""The decoder against transformers, on tiny checkpoints of every supported family."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fluxion_jax
from fluxion_jax.models import Decoder, load_model
from fluxion_jax.rope import Rope
from tests.goldens import load as goldens


@pytest.mark.parametrize("name", goldens.TINY)
def test_logits_match_transformers(name: str) -> None:
    folder, tokens, expected = goldens.tiny(name)
    loaded = load_model(folder, dtype="float32")
    logits = nnx.jit(lambda model, ids: model(ids))(loaded.model, jnp.asarray(tokens))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(logits), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", goldens.TINY)
def test_padding_behind_a_row_changes_nothing(name: str) -> None:
    folder, tokens, expected = goldens.tiny(name)
    loaded = load_model(folder, dtype="float32")
    lengths = np.array([70, 23])
    padded = np.where(np.arange(70) < lengths[:, None], tokens, 0)
    logits = np.asarray(loaded.model(jnp.asarray(padded), jnp.asarray(lengths)))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row, :length], expected[row, :length], rtol=0, atol=1e-4)


def test_the_tiny_gemma_golden_depends_on_its_window_and_both_ropes() -> None:
    """The golden can only catch mistakes in what shows in it."""
    folder, tokens, expected = goldens.tiny("tiny_gemma3")
    loaded = load_model(folder, dtype="float32")
    state = nnx.state(loaded.model)
    changes = (
        {"sliding_window": 17},
        {"sliding_rope": Rope(1e6)},
        {"rope": Rope(1e6)},
        {"attention_scale": None},
        {"sliding_layers": (1, 2)},
        {"activation": "silu"},
        {"scale_embeddings": False},
    )
    for change in changes:
        other = Decoder.random(dataclasses.replace(loaded.config, **change))
        nnx.update(other, state)
        error = np.abs(np.asarray(other(jnp.asarray(tokens))) - expected).max()
        assert error > 1e-2, change


def test_bfloat16_parameters_give_close_logits() -> None:
    folder, tokens, expected = goldens.tiny("tiny_qwen3")
    loaded = load_model(folder, dtype="bfloat16")
    logits = loaded.model(jnp.asarray(tokens))
    assert logits.dtype == jnp.float32
    assert loaded.model.embedding[...].dtype == jnp.bfloat16
    assert loaded.model.norm.scale[...].dtype == jnp.float32
    error = np.abs(np.asarray(logits) - expected)
    assert np.mean(error) < 0.05


@pytest.mark.parametrize("name", goldens.TINY)
def test_the_cache_gives_the_logits_of_transformers(name: str) -> None:
    """Most of the sequence lies on the host, so keys pass through all of the cache's parts."""
    folder, tokens, expected = goldens.tiny(name)
    loaded = load_model(folder, dtype="float32")
    layout = loaded.config.kv_layout("float32")
    layout = dataclasses.replace(layout, sink_tokens=16, recent_tokens=16)
    cache = fluxion_jax.HostKV.allocate(layout, 2, 80)
    behind = fluxion_jax.prefill(loaded, tokens[:, :53].tolist(), cache, chunk_tokens=24)
    np.testing.assert_allclose(behind, expected[:, 52], rtol=0, atol=1e-4)
    scores = fluxion_jax.score(
        loaded,
        cache,
        tokens[:, 53:].tolist(),
        split=0.5,
        execution=fluxion_jax.Execution(dense_below_tokens=0, measure=True),
    )
    wanted = expected[:, 53:69]
    wanted = wanted - np.logaddexp.reduce(wanted, axis=-1, keepdims=True)
    np.testing.assert_allclose(scores.distributions, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tiny_mistral", {"sliding_window": 17}),
        ("tiny_mistral", {"sliding_layers": (0,)}),
        ("tiny_qwen3_windows", {"sliding_window": 23}),
        ("tiny_qwen3_windows", {"sliding_layers": (2,)}),
        ("tiny_qwen3_windows", {"sliding_layers": (0, 1, 2)}),
    ],
)
def test_the_goldens_depend_on_their_windows(name: str, change: dict[str, Any]) -> None:
    folder, tokens, expected = goldens.tiny(name)
    loaded = load_model(folder, dtype="float32")
    other = Decoder.random(dataclasses.replace(loaded.config, **change))
    nnx.update(other, nnx.state(loaded.model))
    assert np.abs(np.asarray(other(jnp.asarray(tokens))) - expected).max() > 1e-2
