"""Writes the tiny golden checkpoints as GGUF files, the way llama.cpp's converter does.

Names come from the gguf package, so that the loader's own table of names is tested.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import safe_open

ARCHITECTURES = {
    "tiny_llama": gguf.MODEL_ARCH.LLAMA,
    "tiny_qwen2": gguf.MODEL_ARCH.QWEN2,
    "tiny_qwen3": gguf.MODEL_ARCH.QWEN3,
    "tiny_gemma3": gguf.MODEL_ARCH.GEMMA3,
}


def write_gguf(folder: Path, target: Path, **changes: Any) -> None:
    """Converts a checkpoint; `changes` override metadata, None leaves a key out."""
    config = json.loads((folder / "config.json").read_text())
    arch = ARCHITECTURES[folder.name]
    prefix = gguf.MODEL_ARCH_NAMES[arch]
    metadata: dict[str, Any] = {
        f"{prefix}.vocab_size": config["vocab_size"],
        f"{prefix}.context_length": config["max_position_embeddings"],
        f"{prefix}.embedding_length": config["hidden_size"],
        f"{prefix}.block_count": config["num_hidden_layers"],
        f"{prefix}.feed_forward_length": config["intermediate_size"],
        f"{prefix}.attention.head_count": config["num_attention_heads"],
        f"{prefix}.attention.head_count_kv": config["num_key_value_heads"],
        f"{prefix}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        **tokenizer_metadata(),
    }
    if "head_dim" in config:
        metadata[f"{prefix}.attention.key_length"] = config["head_dim"]
        metadata[f"{prefix}.attention.value_length"] = config["head_dim"]
    rope = config["rope_parameters"]
    if prefix == "gemma3":
        metadata[f"{prefix}.attention.sliding_window"] = config["sliding_window"]
        metadata[f"{prefix}.attention.sliding_window_pattern"] = [
            kind == "sliding_attention" for kind in config["layer_types"]
        ]
        rope = rope["full_attention"]
        metadata[f"{prefix}.rope.scaling.type"] = "linear"
        metadata[f"{prefix}.rope.scaling.factor"] = rope["factor"]
    metadata[f"{prefix}.rope.freq_base"] = rope["rope_theta"]
    metadata.update(changes)

    writer = gguf.GGUFWriter(target, prefix)
    for key, value in metadata.items():
        write_pair(writer, key, value)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                array = tensors.get_tensor(name).astype(np.float32)
                if prefix == "llama" and "q_proj" in name:
                    array = interleave(array, config["num_attention_heads"])
                if prefix == "llama" and "k_proj" in name:
                    array = interleave(array, config["num_key_value_heads"])
                if prefix == "gemma3" and "norm" in name:
                    array = array + 1.0
                stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
                writer.add_tensor(stored, array)
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_divisors(rope, config["head_dim"]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tokenizer_metadata() -> dict[str, Any]:
    """A byte-level tokenizer of 64 tokens: two special ones, letters, and one merge."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list(
        "ĠABCDEFGHIJKLMNOPQRSTUVWXYZ!.,"
    )
    tokens = ["<|endoftext|>", "<|im_end|>", *letters, "ab", "Ġc"]
    tokens += [f"<unused{i}>" for i in range(64 - len(tokens))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * 62,
        "tokenizer.ggml.merges": ["a b", "Ġ c"],
        "tokenizer.ggml.eos_token_id": 1,
    }


def write_pair(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Adds metadata of the type that fits; None adds nothing."""
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def interleave(array: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to queries and keys of the "llama" architecture."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def _llama3_divisors(rope: dict[str, float], head_dim: int) -> np.ndarray:
    """As written in llama.cpp's converter, one frequency at a time."""
    divisors = []
    original = rope["original_max_position_embeddings"]
    low, high = original / rope["low_freq_factor"], original / rope["high_freq_factor"]
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        if wavelength < high:
            divisors.append(1.0)
        elif wavelength > low:
            divisors.append(rope["factor"])
        else:
            smooth = (original / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(divisors, np.float32)
