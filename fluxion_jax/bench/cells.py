"""Cells of a benchmark, each kept in a file of its own so that an interrupted run goes on."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fluxion_jax.errors import ConfigError
from fluxion_jax.whole_files import replaced


def with_cases(settings: Any, names: Sequence[str]) -> Any:
    """The settings of a benchmark with some of its cases only.

    Args:
      settings: a dataclass with `cases`, each with a `name`.
      names: of the cases wanted; all of them if there are none.

    Raises:
      ConfigError: a name is none of a case.
    """
    known = {case.name: case for case in settings.cases}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"expected cases out of {', '.join(known)}, got {', '.join(unknown)}")
    if not names:
        return settings
    return dataclasses.replace(settings, cases=tuple(known[name] for name in dict.fromkeys(names)))


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


_REASON_CHARACTERS = 400


class Cells:
    """Cells of one benchmark that may run out of time, and of which one may fail.

    Attributes:
      left_out: names of cells that were not begun for lack of time.
      failed: reasons by name of the cells that failed.
    """

    def __init__(
        self,
        benchmark: str,
        folder: Path | None,
        say: Callable[[str], None],
        budget_s: float | None,
    ) -> None:
        """Begins to count the time.

        Args:
          benchmark: begins the name of every file.
          folder: see `cell`.
          say: told in one line what is measured next.
          budget_s: no further cell is begun after so many seconds; None sets no limit.
        """
        self._benchmark, self._folder, self.say = benchmark, folder, say
        self._end = None if budget_s is None else time.monotonic() + budget_s
        self._known: dict[str, dict[str, Any]] = {}
        self.left_out: list[str] = []
        self.failed: dict[str, str] = {}

    def cell(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """A cell's figures, or None if it was not measured before and fails or the time is over.

        One that has failed is not tried again.
        """
        if name in self.failed:
            return None

        def measured() -> dict[str, Any]:
            if self._end is not None and time.monotonic() > self._end:
                raise _OutOfTimeError
            start = time.monotonic()
            self.say(name)
            result = measure()
            return {**result, "took_s": time.monotonic() - start}

        file = f"{self._benchmark}-{name}".replace(":", "_")
        try:
            if name not in self._known:
                self._known[name] = cell(self._folder, file, measured)
            return self._known[name]
        except _OutOfTimeError:
            if name not in self.left_out:
                self.left_out.append(name)
        except Exception as error:
            # One cell that cannot be measured must not cost the others.
            self.failed[name] = f"{type(error).__name__}: {error}"[:_REASON_CHARACTERS]
            self.say(f"failed: {self.failed[name]}")
            self.after_failure()
        return None

    def after_failure(self) -> None:
        """Drops what a failed cell may have consumed."""


class _OutOfTimeError(Exception):
    """No further cell may be begun."""


def _keep(path: Path, result: dict[str, Any]) -> None:
    """Writes a file that is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as file:
        file.write((json.dumps(result, indent=2) + "\n").encode())
