"""Calibrated weights on disk: whole at any time, checked when read, and bound to their model.

A folder holds one or more versions written by orbax and `calibration.json`, which names the current
one with the SHA-256 of each of its files. The record is replaced in one step after the version it
names is complete, and older versions are removed after that; so whenever a process is killed, the
record names a whole version.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fluxion_jax.errors import ConfigError, FluxionError, IntegrityError
from fluxion_jax.policy.features import NAMES
from fluxion_jax.policy.fixed_policy import full
from fluxion_jax.policy.fluxion_policy import DEFAULT_TOLERANCE, FluxionPolicy, Safety
from fluxion_jax.policy.head_predictor import HeadPredictor
from fluxion_jax.policy.protocol import Policy

# 2: the safety bounds the error that is left; those of 1 lost answers.
FORMAT = 2
RECORD = "calibration.json"
SHIPPED = Path(__file__).parent / "weights"
_SAMPLED_VALUES = 1024


def model_identity(model: nnx.Module, config: Any) -> str:
    """What a calibration is bound to: SHA-256 of a model's sizes and of a sample of its weights.

    Of each parameter up to 1,024 values spread over it count, rounded to bfloat16: so the same
    model loaded in float32 and in bfloat16 is the same, another fine-tuning is not, and a large
    model is identified in a moment.

    Args:
      model: with its parameters.
      config: its `ModelConfig`.
    """
    found = hashlib.sha256(repr(config).encode())
    for path, leaf in sorted(nnx.to_flat_state(nnx.state(model, nnx.Param)), key=_path_text):
        values = leaf[...].reshape(-1)
        stride = -(-values.size // _SAMPLED_VALUES)
        sample = np.asarray(values[::stride].astype(jnp.bfloat16).astype(jnp.float32))
        found.update(f"{_path_text((path, None))}{leaf.shape}".encode())
        found.update(np.ascontiguousarray(sample).tobytes())
    return found.hexdigest()


def _path_text(item: tuple[Any, Any]) -> str:
    return "/".join(map(str, item[0]))


def kept_folder(identity: str) -> Path:
    """Where `fluxion calibrate` keeps weights by default, and `fluxion` looks for them."""
    return _kept_root() / identity[:16]


def _kept_root() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "fluxion_jax" / "calibration"


def find_calibration(model: nnx.Module, config: Any) -> Path:
    """The folder with a model's calibrated weights: the user's own, or those that are shipped.

    Raises:
      ConfigError: there are none.
    """
    identity = model_identity(model, config)
    place = _place(identity)
    if place is None:
        raise ConfigError(
            f"expected calibrated weights for this model ({identity[:16]}) in "
            f"{kept_folder(identity)}, got none; run: fluxion calibrate --model MODEL, or choose a "
            "policy such as fixed:16:0.05"
        )
    return place


def _place(identity: str) -> Path | None:
    places = (kept_folder(identity), SHIPPED / identity[:16])
    return next((place for place in places if (place / RECORD).is_file()), None)


def default_policy(model: Any) -> Policy:
    """`fluxion` for a model with calibrated weights, else `full`.

    Args:
      model: a `LoadedModel`, or a decoder with its `config`; any other object has no weights.

    Raises:
      IntegrityError: there are weights, and they are damaged.
    """
    roots = (_kept_root(), SHIPPED)
    # Where nothing was ever calibrated, no model needs to be identified.
    if not any(True for root in roots for _ in root.glob(f"*/{RECORD}")):
        return full()
    network = model if isinstance(model, nnx.Module) else getattr(model, "model", model)
    config = getattr(network, "config", None)
    if not isinstance(network, nnx.Module) or config is None:
        return full()
    identity = model_identity(network, config)
    place = _place(identity)
    return full() if place is None else load_calibration(place, identity)


def save_calibration(
    folder: Path, policy: FluxionPolicy, identity: str, report: dict[str, Any]
) -> None:
    """Writes calibrated weights; what was there before stays whole until they are.

    Args:
      folder: made if missing; may hold an earlier calibration.
      policy: with the trained predictor.
      identity: of the model, from `model_identity`.
      report: JSON-ready, how it was calibrated and what it achieves.
    """
    import orbax.checkpoint as ocp

    folder.mkdir(parents=True, exist_ok=True)
    version = f"version-{uuid.uuid4().hex[:12]}"
    arrays = {**_arrays(nnx.merge(policy.graph, policy.weights)), **_safety_arrays(policy.safety)}
    ocp.PyTreeCheckpointer().save(folder.absolute() / version, arrays)
    record = {
        "format": FORMAT,
        "identity": identity,
        "features": list(NAMES),
        "version": version,
        "sha256": file_checksums(folder / version),
        "report": report,
    }
    temporary = folder / f".{version}.json"
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / RECORD)
    for old in folder.glob("version-*"):
        if old.name != version:
            shutil.rmtree(old, ignore_errors=True)
    # What a process that was killed left.
    for unfinished in folder.glob(".version-*.json"):
        unfinished.unlink(missing_ok=True)


def load_calibration(folder: Path, identity: str, tolerance: float | None = None) -> FluxionPolicy:
    """Reads calibrated weights.

    Args:
      folder: what `save_calibration` wrote.
      identity: of the model they must belong to.
      tolerance: of the output error; None takes `DEFAULT_TOLERANCE` of `policy.fluxion_policy`, or
        what is nearest in the calibrated range.

    Raises:
      ConfigError: nothing there, they belong to another model, or the tolerance is out of range.
      IntegrityError: a file is missing, changed, or of another format.
    """
    path = folder / RECORD
    if not path.is_file():
        raise ConfigError(
            f"expected calibrated weights in {folder}, got no {RECORD}; run: fluxion calibrate"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found, version, checksums = record["format"], record["version"], record["sha256"]
        features, owner = record["features"], record["identity"]
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"expected a calibration's record in {path}, got: {error!r}"
        ) from error
    if found != FORMAT or features != list(NAMES):
        raise IntegrityError(
            f"expected calibration format {FORMAT} with this version's {len(NAMES)} features in "
            f"{path}, got format {found} with {len(features)}; calibrate again"
        )
    if owner != identity:
        raise ConfigError(
            f"expected weights calibrated for this model ({identity[:16]}), got those of another "
            f"({owner[:16]}) in {folder}; run: fluxion calibrate for this model"
        )
    if file_checksums(folder / version) != checksums:
        raise IntegrityError(
            f"expected the files that {path} lists, got others in {folder / version}; take another "
            "copy or calibrate again"
        )
    policy = _policy(_restored((folder / version).absolute()))
    if tolerance is None:
        known = policy.safety.tolerances
        tolerance = float(np.clip(DEFAULT_TOLERANCE, known[0], known[-1]))
    return policy.with_tolerance(tolerance)


# A version is written once under a name of its own, and orbax takes a while to read one.
@functools.lru_cache(maxsize=8)
def _restored(version: Path) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    found: dict[str, np.ndarray] = ocp.PyTreeCheckpointer().restore(version)
    return found


def file_checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a version, by its path in the folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _arrays(predictor: HeadPredictor) -> dict[str, np.ndarray]:
    return {name: np.asarray(x[...], np.float32) for name, x in _params(predictor).items()}


def _safety_arrays(safety: Safety) -> dict[str, np.ndarray]:
    return {
        f"safety_{field.name}": np.asarray(getattr(safety, field.name), np.float32)
        for field in dataclasses.fields(safety)
    }


def _policy(arrays: dict[str, np.ndarray]) -> FluxionPolicy:
    try:
        num_layers, num_heads, _ = arrays["heads"].shape
        predictor = HeadPredictor(num_layers, num_heads, rngs=nnx.Rngs(0))
        for name, param in _params(predictor).items():
            if arrays[name].shape != param.shape:
                raise IntegrityError(
                    f"expected {name} of shape {param.shape}, got {arrays[name].shape}; calibrate "
                    "again"
                )
            param[...] = jnp.asarray(arrays[name])
        safety = Safety(*(arrays[f"safety_{f.name}"] for f in dataclasses.fields(Safety)))
    except KeyError as error:
        raise IntegrityError(
            f"expected the predictor's arrays, got none named {error}; calibrate again"
        ) from error
    return make_policy(predictor, safety, float(safety.tolerances[-1]))


def _params(predictor: HeadPredictor) -> dict[str, Any]:
    """The predictor's variables by names that do not depend on the version of Flax."""
    layers = {f"hidden_{i}": layer for i, layer in enumerate(predictor.hidden)}
    layers["out"] = predictor.out
    params = {"heads": predictor.heads, "mean": predictor.mean, "deviation": predictor.deviation}
    for name, layer in layers.items():
        assert layer.bias is not None
        params |= {f"{name}_kernel": layer.kernel, f"{name}_bias": layer.bias}
    return params


def make_policy(predictor: HeadPredictor, safety: Safety, tolerance: float) -> FluxionPolicy:
    """The policy of a predictor."""
    graph, weights = nnx.split(predictor)
    return FluxionPolicy(weights, safety, np.asarray(tolerance, np.float32), graph)


def policy_of(
    model: Any, tolerance: float | None = None, folder: str | Path | None = None
) -> FluxionPolicy:
    """The Fluxion policy of a model.

    Args:
      model: a `LoadedModel`, or a decoder with its `config`.
      tolerance: see `load_calibration`.
      folder: where its weights lie; None looks where `fluxion calibrate` keeps them, then in this
        package.

    Raises:
      ConfigError: there are no weights for this model, or the tolerance is out of range.
      IntegrityError: the weights are damaged.
    """
    network = model if isinstance(model, nnx.Module) else getattr(model, "model", model)
    config = getattr(network, "config", None)
    if not isinstance(network, nnx.Module) or config is None:
        raise FluxionError(
            f"expected a model with parameters and a config, got {type(model).__name__}; load one "
            "with load_model"
        )
    place = find_calibration(network, config) if folder is None else Path(folder).expanduser()
    return load_calibration(place, model_identity(network, config), tolerance)
