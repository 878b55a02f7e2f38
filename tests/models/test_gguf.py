from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from fluxion_jax.errors import IntegrityError, UnsupportedError
from fluxion_jax.models import load_model
from fluxion_jax.models.gguf_file import GGUFFile
from tests.goldens import load as goldens
from tests.models.gguf_writing import write_gguf, write_pair


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen2", "tiny_qwen3"])
def test_logits_match_transformers(name: str, tmp_path: Path) -> None:
    folder, tokens, expected = goldens.tiny(name)
    write_gguf(folder, tmp_path / "model.gguf")
    loaded = load_model(tmp_path / "model.gguf", dtype="float32")
    logits = loaded.model(jnp.asarray(tokens))
    np.testing.assert_allclose(np.asarray(logits), expected, rtol=0, atol=1e-4)


def test_gemma_is_the_same_model_as_from_hugging_face_files(tmp_path: Path) -> None:
    import dataclasses

    from flax import nnx

    from fluxion_jax.models import Decoder

    folder, tokens, expected = goldens.tiny("tiny_gemma3")
    write_gguf(folder, tmp_path / "model.gguf")
    loaded = load_model(tmp_path / "model.gguf", dtype="float32")
    # The checkpoint has another query scale than real ones; GGUF has no field for it.
    config = dataclasses.replace(loaded.config, attention_scale=24**-0.5)
    assert config == load_model(folder, dtype="float32").config
    model = Decoder.random(config)
    nnx.update(model, nnx.state(loaded.model))
    logits = model(jnp.asarray(tokens))
    np.testing.assert_allclose(np.asarray(logits), expected, rtol=0, atol=1e-4)


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    write_gguf(goldens.HERE / "tiny_llama", tmp_path / "model.gguf")
    tokenizer = load_model(tmp_path / "model.gguf").tokenizer
    assert tokenizer.decode(tokenizer.encode("abc c, A!")) == "abc c, A!"
    assert tokenizer.eos_ids == (0, 1)


@pytest.fixture
def complete(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    write_gguf(goldens.HERE / "tiny_llama", path)
    return path


@pytest.mark.parametrize("fraction", [0.0001, 0.01, 0.02, 0.05, 0.5, 0.999])
def test_a_truncated_file_is_reported(complete: Path, fraction: float) -> None:
    content = complete.read_bytes()
    complete.write_bytes(content[: max(5, int(len(content) * fraction))])
    with pytest.raises(IntegrityError, match="truncated"):
        load_model(complete)


def test_every_metadata_prefix_is_an_error_and_nothing_else(complete: Path) -> None:
    content = complete.read_bytes()
    for length in range(4, 2500, 37):
        complete.write_bytes(content[:length])
        with pytest.raises(IntegrityError):
            GGUFFile(complete)


def test_huge_counts_are_refused_before_anything_is_read(complete: Path) -> None:
    content = bytearray(complete.read_bytes())
    key = b"tokenizer.ggml.token_type"
    count_at = content.index(key) + len(key) + 8
    content[count_at : count_at + 8] = struct.pack("<Q", 2**61)
    complete.write_bytes(content)
    with pytest.raises(IntegrityError, match="truncated or damaged"):
        GGUFFile(complete)


@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x00\x00\x00safetensors", b"hello world"])
def test_a_foreign_file_is_reported(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="expected a GGUF file, one that starts with b'GGUF'"):
        load_model(path)


def test_versions_and_quantisations_from_the_future(complete: Path) -> None:
    content = bytearray(complete.read_bytes())
    content[4] = 9
    complete.write_bytes(content)
    with pytest.raises(UnsupportedError, match="got version 9"):
        GGUFFile(complete)
    content[4] = 3
    name = b"output_norm.weight"
    kind_at = content.index(name) + len(name) + 4 + 8
    content[kind_at] = 250
    complete.write_bytes(content)
    with pytest.raises(UnsupportedError, match=r"tensor output_norm.weight, got type 250"):
        GGUFFile(complete)


def _rewrite(path: Path, rename: dict[str, str | None], extra: tuple[str, ...] = ()) -> None:
    """The same file with tensors renamed, dropped (None) or added."""
    file = GGUFFile(path)
    tensors = {rename.get(n, n): file.read(n) for n in file.shapes}
    tensors |= {name: np.ones((2, 2), np.float32) for name in extra}
    other = path.with_suffix(".new")
    writer = gguf.GGUFWriter(other, "llama")
    for key, value in file.metadata.items():
        if key != "general.architecture":
            write_pair(writer, key, value)
    for name, tensor in tensors.items():
        if name is not None:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    other.replace(path)


def test_a_missing_tensor_is_named(complete: Path) -> None:
    _rewrite(complete, {"blk.1.ffn_up.weight": None})
    with pytest.raises(IntegrityError, match=r"got none named blk\.1\.ffn_up\.weight"):
        load_model(complete)


def test_an_unused_tensor_is_named(complete: Path) -> None:
    _rewrite(complete, {}, extra=("blk.0.attn_sinks.weight",))
    with pytest.raises(UnsupportedError, match=r"got blk\.0\.attn_sinks\.weight"):
        load_model(complete)


def test_a_tensor_of_the_wrong_shape_is_named(complete: Path) -> None:
    _rewrite(
        complete,
        {
            "blk.0.ffn_up.weight": "blk.0.ffn_down.weight",
            "blk.0.ffn_down.weight": "blk.0.ffn_up.weight",
        },
    )
    with pytest.raises(
        IntegrityError, match=r"blk\.0\.ffn_up\.weight .* shape \(48, 36\), got \(36, 48\)"
    ):
        load_model(complete)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"tokenizer.ggml.model": "t5"}, UnsupportedError, "'gpt2' or 'llama', got 't5'"),
        ({"tokenizer.ggml.pre": "poro"}, UnsupportedError, "one of gpt-2, smollm.*got 'poro'"),
        ({"tokenizer.ggml.merges": None}, IntegrityError, r"expected tokenizer\.ggml\.merges"),
    ],
)
def test_tokenizers_that_cannot_be_rebuilt(
    tmp_path: Path, change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    write_gguf(goldens.HERE / "tiny_llama", tmp_path / "model.gguf", **change)
    with pytest.raises(kind, match=message):
        load_model(tmp_path / "model.gguf")
