"""Checks what a built wheel holds: the packages, with or without the host library, no C++ sources.

python tools/check_wheel.py --native|--pure WHEEL
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from pathlib import Path

LIBRARY = "host_ops/_native/libfluxion_host.so"
EXPECTED = {f"{package}/py.typed" for package in ("fluxion_jax", "host_ops", "pallas_kernels")}
EXPECTED |= {
    f"fluxion_jax/models/recall_12m/{name}" for name in ("model.safetensors", "config.json")
}
EXPECTED |= {"fluxion_jax/machines/h100.json"}
TOP_LEVEL = {"fluxion_jax", "host_ops", "pallas_kernels"}


def problems(wheel: Path, native: bool) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    found = [f"{name} is missing" for name in sorted(EXPECTED - names)]
    strangers = {name.partition("/")[0] for name in names} - TOP_LEVEL
    found += [f"{name} does not belong" for name in sorted(strangers) if ".dist-info" not in name]
    found += [f"{name} is a source" for name in sorted(names) if "/csrc/" in name]
    if not any(name.endswith("/licenses/LICENSE") for name in names):
        found.append("the license is missing")
    libraries = {name for name in names if name.endswith(".so")}
    wanted = {LIBRARY} if native else set()
    if libraries != wanted:
        found.append(f"expected the libraries {sorted(wanted)}, got {sorted(libraries)}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--native", action="store_true", help="it must hold the host library")
    kind.add_argument("--pure", action="store_true", help="it must hold Python only")
    parser.add_argument("wheel", type=Path)
    options = parser.parse_args()
    found = problems(options.wheel, options.native)
    print("\n".join([f"{options.wheel.name}: {len(found)} problems", *found]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
