"""Packaged models against transformers, which loads the same GGUF files."""

from __future__ import annotations

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


# pytest runs the tests of one model after each other, and lets go of it before the next: both at
# once, with their logits, would take several GB.
@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def loaded(name: str) -> LoadedModel:
    return load_model(name, dtype="float32")


def only(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [name], indirect=True, scope="module")


def golden_name(name: str) -> str:
    return name.replace("-", "_")


def test_logits_match_transformers(name: str, loaded: LoadedModel) -> None:
    golden = goldens.logits(golden_name(name))

    @nnx.jit
    def run(model: nnx.Module, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = model(tokens)[0, golden.positions]
        return jnp.take_along_axis(rows, golden.top_ids, axis=-1), jax.nn.logsumexp(rows, axis=-1)

    top_logits, logsumexp = run(loaded.model, jnp.asarray(golden.tokens)[None])
    np.testing.assert_allclose(top_logits, golden.top_logits, rtol=0, atol=5e-4)
    np.testing.assert_allclose(logsumexp, golden.logsumexp, rtol=0, atol=5e-4)


def test_dequantised_weights_match_transformers(name: str, loaded: LoadedModel) -> None:
    expected = goldens.weight_sums(golden_name(name))
    values = dict(nnx.to_flat_state(nnx.state(loaded.model)))
    paths = {p.hf: p.path for p in parameters(loaded.config)}
    assert paths.keys() == expected.keys()
    for hf_name, path in paths.items():
        # transformers keeps the difference from one
        shift = 1.0 if loaded.config.architecture == "gemma3" and "norm" in hf_name else 0.0
        got = np.zeros(2)
        # The embedding in float64, as a whole, would take more memory than the model.
        for part in np.array_split(np.asarray(values[path][...]), 32):
            exact = part.astype(np.float64) - shift
            got += exact.sum(), np.abs(exact).sum()
        tolerance = 1e-6 * expected[hf_name][1]
        np.testing.assert_allclose(got, expected[hf_name], rtol=0, atol=tolerance, err_msg=hf_name)


def test_encodings_match_llama_cpp(name: str, loaded: LoadedModel) -> None:
    tokenizer = loaded.tokenizer
    for text, ids in goldens.encodings(golden_name(name)):
        assert tokenizer.encode(text, add_bos=False) == ids, text
        assert tokenizer.decode(ids, skip_special=False) == text


def test_start_and_end_tokens(name: str, loaded: LoadedModel) -> None:
    starts, ends = {"smollm2-135m": ([], (0, 2)), "gemma3-270m": ([2], (1, 106))}[name]
    ids = loaded.tokenizer.encode("Hi")
    assert ids == [*starts, *loaded.tokenizer.encode("Hi", add_bos=False)]
    assert loaded.tokenizer.eos_ids == ends
    assert loaded.tokenizer.decode(ids) == "Hi"


@only("smollm2-135m")
def test_chat_of_smollm2(loaded: LoadedModel) -> None:
    ids = loaded.tokenizer.chat([{"role": "user", "content": "Hi"}])
    assert loaded.tokenizer.decode(ids, skip_special=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@only("gemma3-270m")
def test_a_base_model_has_no_chat_format(loaded: LoadedModel) -> None:
    from fluxion_jax.errors import UnsupportedError

    with pytest.raises(UnsupportedError, match="got no template; write the prompt yourself"):
        loaded.tokenizer.chat([{"role": "user", "content": "Hi"}])


@pytest.mark.slow
@only("smollm2-135m")
def test_the_greedy_goldens_are_what_the_dense_path_prefers(loaded: LoadedModel) -> None:
    """Data, weights and prompts belong together; decoding is tested elsewhere."""
    golden = goldens.greedy("2k")
    sequence = np.concatenate([golden.prompt, golden.tokens])

    @nnx.jit
    def run(model: nnx.Module, tokens: jax.Array) -> jax.Array:
        return model(tokens)[0, len(golden.prompt) - 1 : -1].argmax(axis=-1)

    best = run(loaded.model, jnp.asarray(sequence)[None])
    np.testing.assert_array_equal(best, golden.tokens)
