"""Puts calibrated weights into the package, where the policy `fluxion` finds them by their model.

    python tools/ship_weights.py FOLDER...

A FOLDER is what `fluxion calibrate --output FOLDER` wrote. The record and the version that it names
are copied to `fluxion_jax/calibration/weights/`, in a folder named by the model's identity; what
was there for the same model is replaced.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from fluxion_jax.calibration.storage import RECORD, SHIPPED, file_checksums, load_calibration

COMMITTED = "commit_success.txt"


def ship(folder: Path, target: Path = SHIPPED) -> Path:
    """Copies the weights of a folder; returns where they are now."""
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    # Raises where a file is damaged.
    load_calibration(folder, record["identity"])
    place = target / record["identity"][:16]
    if place.exists():
        shutil.rmtree(place)
    version = place / record["version"]
    shutil.copytree(folder / record["version"], version)
    # Orbax notes there where on the machine it wrote; that it is there is all it looks for.
    (version / COMMITTED).write_text("Checkpoint commit was successful\n", encoding="utf-8")
    record["sha256"] = file_checksums(version)
    (place / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    load_calibration(place, record["identity"])
    return place


def main(arguments: list[str]) -> None:
    for name in arguments:
        place = ship(Path(name))
        size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        report = json.loads((place / RECORD).read_text(encoding="utf-8"))["report"]
        model = report.get("settings", {}).get("model", "a model")
        print(f"{model}: {place}, {size / 1024:.0f} KiB")


if __name__ == "__main__":
    main(sys.argv[1:])
