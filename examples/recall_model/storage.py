"""Files of a training run: weights in pieces, the optimiser's moments, the record, the model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.flax import load_file, save_file

from recall_model.model import RecallModel, Sizes, from_hf_tensors, hf_tensors

NUM_PIECES = 4
RECORD = "training.json"
# Twice as large as the weights, so in one file of its own that a run can do without.
_MOMENTS = "moments.npz"


def flat_weights(state: Any) -> np.ndarray:
    """float32 `[N]`: all parameters one after another."""
    return np.concatenate([np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(state)])


def unflattened(state: Any, weights: np.ndarray) -> Any:
    """The parameters of `flat_weights` in the form of a state."""
    leaves, treedef = jax.tree.flatten(state)
    ends = np.cumsum([leaf.size for leaf in leaves])
    parts = np.split(weights, ends[:-1])
    return jax.tree.unflatten(
        treedef, [jnp.asarray(p.reshape(leaf.shape)) for p, leaf in zip(parts, leaves, strict=True)]
    )


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_bytes(content)
    temporary.replace(path)


def save(folder: Path, state: Any, moments: Any, record: dict[str, Any]) -> None:
    """Writes weights, moments and record; each file is whole at any time."""
    weights = flat_weights(state)
    record = {**record, "weights_sha256": hashlib.sha256(weights.tobytes()).hexdigest()}
    for i, piece in enumerate(np.array_split(weights, NUM_PIECES)):
        _replace(folder / f"weights_{i}.f32", piece.tobytes())
    leaves = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(moments))}
    temporary = folder / "moments.new.npz"
    np.savez(temporary, of=record["weights_sha256"], **leaves)
    temporary.replace(folder / _MOMENTS)
    save_record(folder, record)


def load_moments(folder: Path, moments: Any, record: dict[str, Any]) -> Any | None:
    """Reads the moments that belong to the weights of a record, or None where there are none."""
    path = folder / _MOMENTS
    if not path.exists():
        return None
    with np.load(path) as file:
        if str(file["of"]) != record["weights_sha256"]:
            return None
        leaves, treedef = jax.tree.flatten(moments)
        return jax.tree.unflatten(treedef, [jnp.array(file[str(i)]) for i in range(len(leaves))])


def save_record(folder: Path, record: dict[str, Any]) -> None:
    """Writes the record."""
    _replace(folder / RECORD, json.dumps(record, indent=1).encode())


def read_record(folder: Path) -> dict[str, Any]:
    """Reads the record, without starting JAX's devices."""
    record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    return record


def load(folder: Path, state: Any) -> tuple[Any, dict[str, Any]]:
    """Reads what `save` wrote into the form of a state.

    Raises:
      ValueError: weights and record are of different moments or models.
    """
    record = read_record(folder)
    pieces = [(folder / f"weights_{i}.f32").read_bytes() for i in range(NUM_PIECES)]
    raw = b"".join(pieces)
    if hashlib.sha256(raw).hexdigest() != record["weights_sha256"]:
        raise ValueError(
            f"expected the weights of {RECORD} in {folder}, got others; take another copy"
        )
    return unflattened(state, np.frombuffer(raw, np.float32)), record


def abstract_model(sizes: Sizes) -> tuple[Any, Any]:
    """Graph and abstract parameters of a model."""
    return nnx.split(nnx.eval_shape(lambda: RecallModel(sizes, nnx.Rngs(0))))


def export(folder: Path, model: RecallModel) -> None:
    """Writes `model.safetensors` (bfloat16) beside config.json and tokenizer.json.

    The record gets its SHA-256, so that a copy of both says what the weights came from.
    """
    tensors = {k: jnp.array(v, jnp.bfloat16) for k, v in hf_tensors(model).items()}
    path = folder / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)
    record = read_record(folder)
    record["export_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    save_record(folder, record)


def load_exported(folder: Path, sizes: Sizes) -> tuple[Any, dict[str, Any]]:
    """Reads the weights that `export` wrote, and their record.

    Raises:
      ValueError: the weights are others than the record's.
    """
    path, record = folder / "model.safetensors", read_record(folder)
    if hashlib.sha256(path.read_bytes()).hexdigest() != record["export_sha256"]:
        raise ValueError(f"expected the weights of {RECORD} in {path}, got others")
    return nnx.state(from_hf_tensors(sizes, load_file(path))), record


def write_config(folder: Path, sizes: Sizes) -> None:
    """Writes `config.json`."""
    (folder / "config.json").write_text(json.dumps(sizes.hf_config(), indent=2) + "\n", "utf-8")
