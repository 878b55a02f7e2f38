"""One function that loads any supported model file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from fluxion_jax.errors import ConfigError, is_one_of, require_path
from fluxion_jax.models.config import ModelConfig
from fluxion_jax.models.decoder import Decoder
from fluxion_jax.models.gguf import gguf_config, load_gguf
from fluxion_jax.models.gguf_file import GGUFFile
from fluxion_jax.models.huggingface import huggingface_config, load_huggingface
from fluxion_jax.models.packaged import PACKAGED_NAMES, packaged_file
from fluxion_jax.models.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
      model: the decoder with its weights.
      tokenizer: None if the files have none.
      config: sizes and switches of the model.
      name: name or path it was loaded by.
    """

    model: Decoder
    tokenizer: Tokenizer | None
    config: ModelConfig
    name: str

    def __str__(self) -> str:
        config, dtype = self.config, self.model.embedding[...].dtype
        tokenizer = "without a tokenizer" if self.tokenizer is None else "with a tokenizer"
        return (
            f"{self.name}: {config.num_layers} layers, {config.num_heads} query and "
            f"{config.num_kv_heads} KV heads of {config.head_dim}, {dtype}, {tokenizer}"
        )


def load_model(path_or_name: str | Path, *, dtype: str | None = None) -> LoadedModel:
    """Loads a GGUF file, a Hugging Face directory or a packaged model.

    Args:
      path_or_name: a `.gguf` file; a directory with config.json and safetensors; "recall-12m", a
        small long-context model that comes with the library; or "smollm2-135m" or "gemma3-270m",
        which come as Python packages.
      dtype: dtype of parameters and activations, "float32" or "bfloat16"; None means float32 on
        the CPU and bfloat16 on an accelerator.

    Returns:
      The decoder with its weights, its tokenizer and its configuration.

    Raises:
      ConfigError: nothing there, or an unknown dtype.
      FluxionError: the package of a packaged model or of the `models` extra is missing.
      IntegrityError: a file is truncated, incomplete or something else.
      UnsupportedError: the architecture or one of its features is not implemented.

    Example:
      >>> from fluxion_jax.models import load_model
      >>> loaded = load_model("recall-12m", dtype="float32")
      >>> print(loaded)
      recall-12m: 6 layers, 8 query and 4 KV heads of 64, float32, with a tokenizer
    """
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if not is_one_of(dtype, ("float32", "bfloat16")):
        raise ConfigError(f"expected dtype 'float32' or 'bfloat16', got {dtype!r}; choose one")
    name, path = str(path_or_name), _path(path_or_name)
    loaded: tuple[Decoder, Tokenizer | None, Any]
    if path.is_dir():
        loaded = load_huggingface(path, dtype=dtype)
    elif path.suffix == ".safetensors":
        raise ConfigError(
            f"expected a directory for safetensors, got the file {path}; pass {path.parent}, "
            "which must also hold config.json"
        )
    else:
        loaded = load_gguf(path, dtype=dtype)
    model, tokenizer, config = loaded
    return LoadedModel(model, tokenizer, config, name)


def load_config(path_or_name: str | Path) -> ModelConfig:
    """Reads only the configuration of what `load_model` would load.

    Raises:
      ConfigError: nothing there.
      FluxionError: the package of a packaged model or of the `models` extra is missing.
      IntegrityError: a file is truncated, incomplete or something else.
      UnsupportedError: the architecture or one of its features is not implemented.
    """
    path = _path(path_or_name)
    return huggingface_config(path) if path.is_dir() else gguf_config(GGUFFile(path))


def _path(path_or_name: str | Path) -> Path:
    require_path(path_or_name, "a model, or the name of one")
    name = str(path_or_name)
    path = packaged_file(name) if name in PACKAGED_NAMES else Path(path_or_name).expanduser()
    if not path.exists():
        raise ConfigError(
            f"expected a GGUF file, a model directory or one of {', '.join(PACKAGED_NAMES)}, got "
            f"{name!r}, which does not exist; check the path"
        )
    return path
