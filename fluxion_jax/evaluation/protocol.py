"""A frozen protocol: what the headline table is measured on, fixed before any result."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluxion_jax.errors import ConfigError, IntegrityError
from fluxion_jax.evaluation.runner import (
    REAL_TEXT,
    Settings,
    prompts_sha256,
    real_texts,
    task_samples,
)
from fluxion_jax.models.load import LoadedModel

_NAMES = ("policies", "tasks", "lengths_tokens", "samples", "seed", "batch")


def load_protocol(path: Path, *, shared_prefix: bool = False) -> tuple[Settings, dict[str, Any]]:
    """Reads a protocol.

    Args:
      path: of the file.
      shared_prefix: run it from a shared prefix, its oracles included.

    Returns:
      The settings, and the whole document with its own `sha256`.

    Raises:
      ConfigError: something is missing, or not possible.
    """
    content = path.read_bytes()
    document: dict[str, Any] = json.loads(content)
    missing = [name for name in (*_NAMES, "prompts_sha256") if name not in document]
    if missing:
        raise ConfigError(f"expected {missing[0]} in the protocol {path}, got none; add it")
    values: dict[str, Any] = {
        name: tuple(document[name]) if isinstance(document[name], list) else document[name]
        for name in _NAMES
    }
    if shared_prefix:
        oracles = (f"oracle:{tolerance}" for tolerance in document.get("oracle_tolerances", ()))
        values |= {"policies": (*values["policies"], *oracles), "shared_prefix": True}
    settings = Settings(**values)
    return settings, {**document, "sha256": hashlib.sha256(content).hexdigest()}


def part_of(
    settings: Settings,
    *,
    policies: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    lengths_tokens: Sequence[int] | None = None,
    samples: int | None = None,
) -> Settings:
    """Fewer tasks, lengths or samples of a protocol, or other policies on its prompts.

    Args:
      settings: of the whole protocol.
      policies: to evaluate instead; None for those of the protocol.
      tasks: some of the protocol's; None for all.
      lengths_tokens: likewise.
      samples: the first so many of each task and length; None for all.

    Raises:
      ConfigError: the protocol has no such task or length, or fewer samples.
    """
    for name, asked, known in (
        ("tasks", tasks, settings.tasks),
        ("lengths", lengths_tokens, settings.lengths_tokens),
    ):
        unknown = [x for x in asked or () if x not in known]
        if unknown:
            raise ConfigError(
                f"expected {name} of the protocol, out of {', '.join(map(str, known))}, got "
                f"{unknown[0]}; leave it out, or evaluate without the protocol"
            )
    if samples is not None and not 1 <= samples <= settings.samples:
        raise ConfigError(
            f"expected 1 to {settings.samples} samples, as many as the protocol has, got {samples}"
        )
    return dataclasses.replace(
        settings,
        policies=tuple(policies or settings.policies),
        tasks=tuple(tasks or settings.tasks),
        lengths_tokens=tuple(lengths_tokens or settings.lengths_tokens),
        samples=samples or settings.samples,
    )


def first_prompts(model: LoadedModel, settings: Settings) -> dict[str, str]:
    """SHA-256 of the first sample of each task and length, in the model's tokens."""
    found = {}
    for length in settings.lengths_tokens:
        for task in settings.tasks:
            if task == REAL_TEXT:
                (stretch,) = real_texts(model, settings, [length], [settings.seed])[length]
                digest = hashlib.sha256(json.dumps(stretch).encode()).hexdigest()
            else:
                digest = prompts_sha256(task_samples(model, task, length, [settings.seed]))
            found[f"{task}:{length}"] = digest
    return found


def frozen_for(model: LoadedModel) -> str:
    """Name of a set of hashes: prompts depend on the tokenizer, and prose on Python's release."""
    return f"{model.name}, Python {platform.python_version()}"


def check_prompts(model: LoadedModel, settings: Settings, document: dict[str, Any]) -> bool:
    """Checks that a model gets the prompts that the protocol was frozen with.

    Returns:
      Whether there are hashes for this model and version of Python.

    Raises:
      IntegrityError: a prompt is another one.
    """
    frozen = document["prompts_sha256"].get(frozen_for(model))
    if frozen is None:
        return False
    made = first_prompts(model, settings)
    changed = [name for name, digest in made.items() if frozen.get(name) != digest]
    if changed:
        raise IntegrityError(
            f"expected the frozen prompts of {frozen_for(model)}, got others for {changed[0]}; "
            "the generators have changed, so freeze a new protocol before any result"
        )
    return True
