"""Cells of a benchmark, each kept in a file of its own so that an interrupted run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def cell(folder: Path | None, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` returns, or what it returned when the cell was last measured.

    Args:
      folder: where cells are kept, made if needed; None keeps nothing.
      name: name of the cell, part of a file name.
      measure: called only where the cell has no file yet; its result must be JSON-ready.
    """
    if folder is None:
        return measure()
    path = folder / f"{name}.json"
    if path.is_file():
        return dict(json.loads(path.read_text()))
    result = measure()
    _keep(path, result)
    return result


def growing_cell(
    folder: Path | None,
    name: str,
    parts: Sequence[str],
    measure: Callable[[list[int]], list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """As `cell`, for what is measured in parts of which more may be wanted later.

    Args:
      folder: where cells are kept, made if needed; None keeps nothing.
      name: name of the cell, part of a file name.
      parts: names of what is wanted; the cell keeps others that it has already.
      measure: given the indices of the parts that the cell lacks, measures these together.
    """
    path = None if folder is None else folder / f"{name}.json"
    kept: dict[str, Any] = {}
    if path is not None and path.is_file():
        kept = json.loads(path.read_text())
    missing = [i for i, part in enumerate(parts) if part not in kept]
    if missing:
        kept |= zip((parts[i] for i in missing), measure(missing), strict=True)
        if path is not None:
            _keep(path, kept)
    return [dict(kept[part]) for part in parts]


def _keep(path: Path, result: dict[str, Any]) -> None:
    """Writes a file that is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(result, indent=2) + "\n")
    partial.replace(path)
