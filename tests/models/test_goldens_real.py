"""Packaged models against transformers, which loads the same GGUF files."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fluxion_jax.models import LoadedModel, load_model
from fluxion_jax.models.weights import parameters
from tests.goldens import load as goldens

pytestmark = pytest.mark.model

MODELS = ("smollm2-135m", "gemma3-270m")


@functools.lru_cache(maxsize=2)
def loaded(name: str) -> LoadedModel:
    return load_model(name, dtype="float32")


def golden_name(name: str) -> str:
    return name.replace("-", "_")


@pytest.mark.parametrize("name", MODELS)
def test_logits_match_transformers(name: str) -> None:
    golden = goldens.logits(golden_name(name))

    @nnx.jit
    def run(model: nnx.Module, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = model(tokens)[0, golden.positions]
        return jnp.take_along_axis(rows, golden.top_ids, axis=-1), jax.nn.logsumexp(rows, axis=-1)

    top_logits, logsumexp = run(loaded(name).model, jnp.asarray(golden.tokens)[None])
    np.testing.assert_allclose(top_logits, golden.top_logits, rtol=0, atol=5e-4)
    np.testing.assert_allclose(logsumexp, golden.logsumexp, rtol=0, atol=5e-4)


@pytest.mark.parametrize("name", MODELS)
def test_dequantised_weights_match_transformers(name: str) -> None:
    expected = goldens.weight_sums(golden_name(name))
    model = loaded(name)
    values = dict(nnx.to_flat_state(nnx.state(model.model)))
    ours = {p.hf: np.asarray(values[p.path][...], np.float64) for p in parameters(model.config)}
    assert ours.keys() == expected.keys()
    for hf_name, array in ours.items():
        if model.config.architecture == "gemma3" and "norm" in hf_name:
            array = array - 1.0  # transformers keeps the difference from one
        got = [array.sum(), np.abs(array).sum()]
        tolerance = 1e-6 * expected[hf_name][1]
        np.testing.assert_allclose(got, expected[hf_name], rtol=0, atol=tolerance, err_msg=hf_name)


@pytest.mark.parametrize("name", MODELS)
def test_encodings_match_llama_cpp(name: str) -> None:
    tokenizer = loaded(name).tokenizer
    for text, ids in goldens.encodings(golden_name(name)):
        assert tokenizer.encode(text, add_bos=False) == ids, text
        assert tokenizer.decode(ids, skip_special=False) == text


def test_start_and_end_tokens() -> None:
    smollm2, gemma3 = (loaded(name).tokenizer for name in MODELS)
    assert smollm2.encode("Hi") == smollm2.encode("Hi", add_bos=False)
    assert smollm2.eos_ids == (0, 2)
    assert gemma3.encode("Hi") == [2, *gemma3.encode("Hi", add_bos=False)]
    assert gemma3.eos_ids == (1, 106)
    assert gemma3.decode(gemma3.encode("Hi")) == "Hi"


def test_chat_of_smollm2() -> None:
    tokenizer = loaded("smollm2-135m").tokenizer
    ids = tokenizer.chat([{"role": "user", "content": "Hi"}])
    assert tokenizer.decode(ids, skip_special=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_base_model_has_no_chat_format() -> None:
    from fluxion_jax.errors import UnsupportedError

    with pytest.raises(UnsupportedError, match="got no template; write the prompt yourself"):
        loaded("gemma3-270m").tokenizer.chat([{"role": "user", "content": "Hi"}])


def test_the_greedy_goldens_are_what_the_dense_path_prefers() -> None:
    """Data, weights and prompts belong together; decoding is tested elsewhere."""
    golden = goldens.greedy("2k")
    sequence = np.concatenate([golden.prompt, golden.tokens])

    @nnx.jit
    def run(model: nnx.Module, tokens: jax.Array) -> jax.Array:
        return model(tokens)[0, len(golden.prompt) - 1 : -1].argmax(axis=-1)

    best = run(loaded("smollm2-135m").model, jnp.asarray(sequence)[None])
    np.testing.assert_array_equal(best, golden.tokens)
