"""Cells of a benchmark, each kept in a file of its own so that an interrupted run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
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
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(result, indent=2) + "\n")
    partial.replace(path)
    return result
