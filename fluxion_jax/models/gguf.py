"""Loading a model from a GGUF file: weights, configuration and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fluxion_jax.models.config import ModelConfig
from fluxion_jax.models.decoder import Decoder
from fluxion_jax.models.gguf_file import GGUFFile
from fluxion_jax.models.tokenizer import Tokenizer
from fluxion_jax.models.tokenizer_gguf import tokenizer_from_gguf
from fluxion_jax.models.weights import Parameter, build, check_names, parameters

_ROPE_DIVISORS = "rope_freqs.weight"


def gguf_config(file: GGUFFile) -> ModelConfig:
    """Reads the configuration of an opened file; for errors see `load_gguf`."""
    divisors: tuple[float, ...] = ()
    if _ROPE_DIVISORS in file.shapes:
        divisors = tuple(float(d) for d in file.read(_ROPE_DIVISORS))
    return ModelConfig.from_gguf(
        file.metadata,
        tied_embeddings="output.weight" not in file.shapes,
        qkv_bias="blk.0.attn_q.bias" in file.shapes,
        out_bias="blk.0.attn_output.bias" in file.shapes,
        rope_divisors=divisors,
    )


def load_gguf(path: str | Path, *, dtype: Any) -> tuple[Decoder, Tokenizer, ModelConfig]:
    """Loads a GGUF file; quantised tensors are dequantised to `dtype`.

    Args:
      path: the file.
      dtype: dtype of the parameters.

    Raises:
      IntegrityError: the file is damaged or lacks tensors.
      UnsupportedError: its architecture, a feature, a quantisation or its tokenizer is unknown.
    """
    file = GGUFFile(path)
    config = gguf_config(file)
    names = [parameter.gguf for parameter in parameters(config)]
    check_names(names, file.shapes, source=str(path), ignored=[_ROPE_DIVISORS])
    interleaved = file.metadata["general.architecture"] == "llama"

    def read(parameter: Parameter) -> np.ndarray:
        tensor = file.read(parameter.gguf)
        return separate_halves(tensor, parameter.heads) if interleaved else tensor

    model = build(config, read, lambda parameter: parameter.gguf, dtype=dtype, source=str(path))
    return model, tokenizer_from_gguf(file.metadata), config


def separate_halves(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's reordering of query and key channels.

    For the "llama" architecture llama.cpp rotates neighbouring channels and so stores channel i
    and channel `H / 2 + i` of a head side by side.

    Args:
      tensor: `[heads * H, ...]`.
      heads: number of heads; 0 for a tensor that was not reordered.
    """
    if not heads:
        return tensor
    pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)
