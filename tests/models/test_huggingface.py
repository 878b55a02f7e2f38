from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fluxion_jax.errors import ConfigError, IntegrityError, UnsupportedError
from fluxion_jax.models import load_model
from tests.goldens import load as goldens


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[str], Path]:
    def copy(name: str) -> Path:
        target = tmp_path / name
        shutil.copytree(goldens.HERE / name, target)
        return target

    return copy


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_missing_tensor_is_named(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("tiny_llama")
    change_tensors(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(IntegrityError, match=r"none named model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(folder)


def test_an_unused_tensor_is_named(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("tiny_llama")
    extra = {"model.layers.0.self_attn.sinks": np.ones(6, np.float32)}
    change_tensors(folder, lambda t: t.update(extra))
    with pytest.raises(UnsupportedError, match=r"got model\.layers\.0\.self_attn\.sinks"):
        load_model(folder)


def test_tensors_that_may_be_there_unread(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("tiny_qwen3")
    extra = {
        "lm_head.weight": np.ones((64, 36), np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
    }
    change_tensors(folder, lambda t: t.update(extra))
    assert load_model(folder).config.tied_embeddings


def test_a_tensor_of_the_wrong_shape_is_named(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("tiny_llama")
    change_config(folder, intermediate_size=40)
    message = r"tensor model\.layers\.0\.mlp\.gate_proj\.weight .* shape \(40, 36\), got \(48, 36\)"
    with pytest.raises(IntegrityError, match=message):
        load_model(folder)


def test_an_unknown_dtype_is_named(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("tiny_llama")
    change_tensors(folder, lambda t: t.update({"model.norm.weight": np.ones(36, np.int8)}))
    with pytest.raises(UnsupportedError, match=r"model\.norm\.weight .* F32, F16, BF16, got I8"):
        load_model(folder)


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_truncated_file_is_reported(checkpoint: Callable[[str], Path], length: int) -> None:
    folder = checkpoint("tiny_llama")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:length])
    with pytest.raises(IntegrityError, match="expected a complete safetensors file"):
        load_model(folder)


def test_a_missing_shard_is_reported(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("tiny_qwen2")
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(IntegrityError, match=r"model-00002-of-00003\.safetensors that the index"):
        load_model(folder)


def test_shards_that_do_not_belong_together(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("tiny_qwen2")
    shutil.copy(
        folder / "model-00001-of-00003.safetensors", folder / "model-00003-of-00003.safetensors"
    )
    with pytest.raises(IntegrityError, match="the shards do not belong together"):
        load_model(folder)


def test_a_shard_outside_the_directory_is_refused(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("tiny_qwen2")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../tiny_llama/model.safetensors"}}))
    with pytest.raises(IntegrityError, match="expected plain file names"):
        load_model(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "pass a directory with a downloaded model"),
        (lambda f: (f / "config.json").write_text("<html>"), "expected JSON in"),
        (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object in"),
        (lambda f: (f / "model.safetensors").unlink(), "expected model.safetensors or"),
    ],
)
def test_directories_that_are_no_model(
    checkpoint: Callable[[str], Path], spoil: Callable[[Path], Any], message: str
) -> None:
    folder = checkpoint("tiny_llama")
    spoil(folder)
    with pytest.raises(IntegrityError, match=message):
        load_model(folder)


def test_an_unsupported_architecture(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("tiny_llama")
    change_config(folder, model_type="mixtral")
    with pytest.raises(UnsupportedError, match="got 'mixtral'"):
        load_model(folder)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_multimodal_gemma(
    checkpoint: Callable[[str], Path], prefix: str
) -> None:
    folder = checkpoint("tiny_gemma3")
    _, tokens, expected = goldens.tiny("tiny_gemma3")
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace("model.", prefix, 1): tensor for name, tensor in tensors.items()}
    renamed["vision_tower.x.weight"] = np.ones(2, np.float32)
    renamed["multi_modal_projector.y"] = np.ones(2, np.float32)
    save_file(renamed, folder / "model.safetensors")
    logits = load_model(folder, dtype="float32").model(jnp.asarray(tokens[:1, :20]))
    np.testing.assert_allclose(np.asarray(logits), expected[:1, :20], rtol=0, atol=1e-4)


def test_the_tokenizer_of_a_directory(checkpoint: Callable[[str], Path]) -> None:
    import tokenizers

    folder = checkpoint("tiny_qwen3")
    assert load_model(folder).tokenizer is None
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "hi": 2, "?": 3}, unk_token="?")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    backend.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_model(folder).tokenizer
    assert tokenizer.encode("hi hi") == [0, 2, 2]
    assert tokenizer.encode("hi hi", add_bos=False) == [2, 2]
    assert tokenizer.eos_ids == (1,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    (folder / "chat_template.jinja").write_text("{{ '<start_of_turn>' }}")
    tokenizer = load_model(folder).tokenizer
    assert tokenizer.eos_ids == (1, 3)
    assert tokenizer.chat([{"role": "user", "content": "hi"}])[0] == 0


def test_paths_and_dtypes_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="or one of recall-12m, smollm2-135m, gemma3-270m, got 'nonsense'"
    ):
        load_model("nonsense")
    with pytest.raises(ConfigError, match="expected dtype 'float32' or 'bfloat16', got 'int8'"):
        load_model(tmp_path, dtype="int8")
    file = goldens.HERE / "tiny_llama" / "model.safetensors"
    with pytest.raises(ConfigError, match="expected a directory for safetensors"):
        load_model(file)
