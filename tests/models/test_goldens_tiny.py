"""The decoder against transformers, on tiny checkpoints of every supported family."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fluxion_jax.models import load_model
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
    import dataclasses

    from fluxion_jax.models.decoder import Decoder
    from fluxion_jax.rope import Rope

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
