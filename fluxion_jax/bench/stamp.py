"""Where and with what a figure was measured; every report carries it."""

from __future__ import annotations

import datetime
import os
import subprocess
from pathlib import Path
from typing import Any

from fluxion_jax import env

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def stamp() -> dict[str, Any]:
    """The machine, the versions, the kernels, the commit and the time, as JSON-ready values.

    Returns:
      The sections of `fluxion info` and also `caches` (bytes by level, as the first CPU sees
      them), `load` (of the last minute), `commit` and `dirty` (None outside of a git checkout) and
      `date` (UTC). FLUXION_COMMIT names the commit of a clean tree that was copied to this machine
      without its history.
    """
    copied = os.environ.get("FLUXION_COMMIT")
    commit = copied or _git("rev-parse", "HEAD")
    changes = "" if copied else _git("status", "--porcelain", "--untracked-files=no")
    report = env.report()
    # Where things lie on a machine tells nothing of what was measured on it.
    for path in ("executable", "JAX_COMPILATION_CACHE_DIR"):
        report["environment"].pop(path, None)
    report["host_library"].pop("path", None)
    return {
        **report,
        "caches": cache_bytes(),
        "torch": env._version("torch"),
        "load": os.getloadavg()[0],
        "commit": commit,
        "dirty": None if changes is None else bool(changes),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def cache_bytes(folder: Path = _CACHES) -> dict[str, int]:
    """Sizes of the data caches by name, such as `{"L1d": 49152, "L2": ..., "L3": ...}`.

    Args:
      folder: sysfs folder of one CPU's caches; an absent one gives an empty dictionary.
    """
    found = {}
    for index in sorted(folder.glob("index*")):
        try:
            level, kind, size = (
                (index / name).read_text().strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        if kind != "Instruction":
            name = f"L{level}" + ("d" if kind == "Data" else "")
            found[name] = int(size[:-1]) * _UNITS[size[-1]]
    return found


def _git(*arguments: str) -> str | None:
    """What git says of the tree that this package lies in, or None if it lies in none."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / "pyproject.toml").is_file():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
