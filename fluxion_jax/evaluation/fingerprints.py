"""Names of results by what they depend on, so that a result is never taken for another."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import jax
import numpy as np
from flax import nnx

from fluxion_jax.policy.protocol import Policy

# Raised when the meaning of a stored result changes.
FORMAT = 1


def digest(**parts: Any) -> str:
    """SHA-256 of JSON-ready values, whatever the order of their names."""
    document = json.dumps({"format": FORMAT, **parts}, sort_keys=True)
    return hashlib.sha256(document.encode()).hexdigest()


def policy_fingerprint(policy: Policy) -> str:
    """SHA-256 of a policy's name, class and numbers."""
    return _of_arrays(f"{type(policy).__qualname__}:{policy}", jax.tree.leaves(policy))


def model_fingerprint(model: nnx.Module, config: Any) -> str:
    """SHA-256 of a model's configuration and weights, dtypes included."""
    return _of_arrays(repr(config), jax.tree.leaves(nnx.state(model, nnx.Param)))


def _of_arrays(text: str, arrays: list[Any]) -> str:
    found = hashlib.sha256(text.encode())
    for array in map(np.asarray, arrays):
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).view(np.uint8).data)
    return found.hexdigest()
