"""Loading a model from a directory in Hugging Face form: config.json, safetensors, tokenizer."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from fluxion_jax.errors import IntegrityError, UnsupportedError
from fluxion_jax.models.config import ModelConfig
from fluxion_jax.models.decoder import Decoder
from fluxion_jax.models.extras import import_extra
from fluxion_jax.models.tokenizer import Tokenizer
from fluxion_jax.models.weights import Parameter, build, check_names, parameters

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = ("F32", "F16", "BF16")


def huggingface_config(path: str | Path) -> ModelConfig:
    """Reads `config.json` of a directory; for errors see `load_huggingface`."""
    return ModelConfig.from_hf(_read_json(Path(path) / "config.json"))


def load_huggingface(
    path: str | Path, *, dtype: Any
) -> tuple[Decoder, Tokenizer | None, ModelConfig]:
    """Loads a directory; the tokenizer is None if there is no tokenizer.json.

    Args:
      path: the directory.
      dtype: dtype of the parameters.

    Raises:
      IntegrityError: a file is missing, truncated or lacks tensors.
      UnsupportedError: the architecture or a feature is unknown.
    """
    folder = Path(path)
    raw = _read_json(folder / "config.json")
    config = ModelConfig.from_hf(raw)
    with contextlib.ExitStack() as stack:
        tensors = _open_tensors(folder, stack)
        named = {_text_name(name): tensor for name, tensor in tensors.items()}
        named.pop("", None)
        wanted = [parameter.hf for parameter in parameters(config)]
        unread = [name for name in named if name.endswith(".rotary_emb.inv_freq")]
        if config.tied_embeddings:
            unread.append("lm_head.weight")
        check_names(wanted, named, source=str(folder), ignored=unread)

        def read(parameter: Parameter) -> np.ndarray:
            file, stored_name = named[parameter.hf]
            kind = file.get_slice(stored_name).get_dtype()
            if kind not in _DTYPES:
                raise UnsupportedError(
                    f"expected tensor {stored_name} of {folder} in one of {', '.join(_DTYPES)}, "
                    f"got {kind}; use an unquantised checkpoint"
                )
            tensor = file.get_tensor(stored_name)
            if parameter.kind == "norm" and config.architecture == "gemma3":
                return tensor.astype(np.float32) + 1.0
            return tensor

        model = build(config, read, lambda p: p.hf, dtype=dtype, source=str(folder))
    return model, _tokenizer(folder, raw), config


def _text_name(name: str) -> str:
    """The name a tensor has in a text-only checkpoint, empty if it belongs to the vision tower."""
    if "vision_tower." in name or "multi_modal_projector." in name:
        return ""
    if name.startswith("language_model."):
        return name.removeprefix("language_model.")
    return name.replace("model.language_model.", "model.", 1)


def _open_tensors(folder: Path, stack: contextlib.ExitStack) -> dict[str, tuple[Any, str]]:
    """File and name of every tensor, by name."""
    if (folder / _INDEX).exists():
        placed: Mapping[str, str] = _read_json(folder / _INDEX).get("weight_map", {})
        outside = [name for name in placed.values() if Path(name).name != name]
        if outside:
            raise IntegrityError(
                f"expected plain file names in {folder / _INDEX}, got {outside[0]!r}; the index "
                "points out of its directory, download it again"
            )
        files = {name: _open(folder / name, stack) for name in sorted(set(placed.values()))}
        for name, file in placed.items():
            if name not in files[file].keys():  # noqa: SIM118 (not a mapping)
                raise IntegrityError(
                    f"expected tensor {name} in {folder / file} as {_INDEX} says, got none; the "
                    "shards do not belong together, download them again"
                )
        return {name: (files[file], name) for name, file in placed.items()}
    if not (folder / _SINGLE).exists():
        raise IntegrityError(
            f"expected {_SINGLE} or {_INDEX} in {folder}, got neither; download the safetensors "
            "files of the model"
        )
    file = _open(folder / _SINGLE, stack)
    return {name: (file, name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def _open(path: Path, stack: contextlib.ExitStack) -> Any:
    if not path.exists():
        raise IntegrityError(
            f"expected the file {path} that the index names, got none; download it"
        )
    try:
        return stack.enter_context(safetensors.safe_open(path, framework="np"))
    except safetensors.SafetensorError as error:
        raise IntegrityError(
            f"expected a complete safetensors file, got {path} of {path.stat().st_size} bytes "
            f"({error}); it is truncated or something else, download it again"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise IntegrityError(
            f"expected the file {path}, got none; pass a directory with a downloaded model"
        ) from error
    except ValueError as error:
        raise IntegrityError(
            f"expected JSON in {path}, got something else ({error}); download it again"
        ) from error
    if not isinstance(content, dict):
        raise IntegrityError(f"expected a JSON object in {path}, got another value; download again")
    return content


def _tokenizer(folder: Path, config: Mapping[str, Any]) -> Tokenizer | None:
    if not (folder / "tokenizer.json").exists():
        return None
    backend = import_extra("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    optional = {}
    for name in ("tokenizer_config.json", "generation_config.json"):
        optional[name] = _read_json(folder / name) if (folder / name).exists() else {}
    settings = optional["tokenizer_config.json"]
    ends = optional["generation_config.json"].get("eos_token_id", config.get("eos_token_id"))
    eos_ids = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    eos_ids |= {_token_id(backend, settings.get("eos_token"))} - {None}
    template = settings.get("chat_template")
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    bos_id = _token_id(backend, settings.get("bos_token"))
    # What the file's own post-processor puts in front says whether sequences start with it.
    starts_with_bos = backend.encode("").ids[:1] == [bos_id]
    return Tokenizer(
        backend,
        bos_id=bos_id,
        eos_ids=[i for i in eos_ids if i is not None],
        add_bos=starts_with_bos,
        chat_template=template if isinstance(template, str) else None,
    )


def _token_id(backend: Any, token: str | Mapping[str, Any] | None) -> int | None:
    content = token["content"] if isinstance(token, Mapping) else token
    return None if content is None else backend.token_to_id(content)
