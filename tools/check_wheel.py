"""Checks what a built wheel or sdist holds, and that a wheel's tag is what its library needs.

python tools/check_wheel.py --native|--pure|--sdist FILE
"""

from __future__ import annotations

import argparse
import email
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "host_ops/_native/libfluxion_host.so"
EXPECTED = {f"{package}/py.typed" for package in ("fluxion_jax", "host_ops", "pallas_kernels")}
EXPECTED |= {
    f"fluxion_jax/models/recall_12m/{name}" for name in ("model.safetensors", "config.json")
}
EXPECTED |= {"fluxion_jax/machines/h100.json", "fluxion_jax/bench/plans/recall-12m.json"}
TOP_LEVEL = {"fluxion_jax", "host_ops", "pallas_kernels"}
# What `make` and pip need to build and test it.
SOURCES = {"LICENSE", "README.md", "Makefile", "pyproject.toml", "tests/conftest.py"}
SOURCES |= {"host_ops/csrc/CMakeLists.txt", "host_ops/csrc/exports.map"}
# Besides those of glibc itself, the one library that jaxlib needs as well.
SYSTEM = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1"}
SYSTEM |= {"libgcc_s.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}


def wheel_problems(wheel: Path, native: bool) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = next(name.partition("/")[0] for name in names if name.endswith(".dist-info/WHEEL"))
        found = metadata_problems(archive.read(f"{info}/METADATA").decode())
        if native and LIBRARY in names:
            with tempfile.TemporaryDirectory() as folder:
                library = archive.extract(LIBRARY, folder)
                found += tag_problems(wheel.name, *needs(Path(library)))
    found += [f"{name} is missing" for name in sorted(EXPECTED - names)]
    strangers = {name.partition("/")[0] for name in names} - TOP_LEVEL - {info}
    found += [f"{name} does not belong" for name in sorted(strangers)]
    found += [f"{name} is a source" for name in sorted(names) if "/csrc/" in name]
    if f"{info}/licenses/LICENSE" not in names:
        found.append("the license is missing")
    libraries = {name for name in names if name.endswith(".so")}
    wanted = {LIBRARY} if native else set()
    if libraries != wanted:
        found.append(f"expected the libraries {sorted(wanted)}, got {sorted(libraries)}")
    return found


def project() -> dict[str, Any]:
    """What pyproject.toml says of the package."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def extras() -> set[str]:
    return set(project()["optional-dependencies"])


def metadata_problems(text: str) -> list[str]:
    """Whether all extras are there, the license has a name, and types are announced."""
    metadata = email.message_from_string(text)
    found = [
        f"the extra {extra} is missing"
        for extra in sorted(extras() - set(metadata.get_all("Provides-Extra", [])))
    ]
    for field, value in (
        ("License-Expression", project()["license"]),
        ("Requires-Python", project()["requires-python"]),
    ):
        if metadata[field] != value:
            found.append(f"expected {field} {value}, got {metadata[field]}")
    if "Typing :: Typed" not in metadata.get_all("Classifier", []):
        found.append("the classifier Typing :: Typed is missing")
    return found


def needs(library: Path) -> tuple[set[str], set[str]]:
    """Libraries that a shared object asks for, and versions such as GLIBC_2.34 of their symbols."""
    command = ["readelf", "--wide", "--dynamic", "--version-info", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    libraries = set(re.findall(r"\(NEEDED\).*\[(.+)\]", text))
    return libraries, set(re.findall(r"Name: ([A-Z]+_[0-9.]+)", text))


def tag_problems(name: str, libraries: set[str], versions: set[str]) -> list[str]:
    found = [f"{library} is not part of every system" for library in sorted(libraries - SYSTEM)]
    found += [f"{v} is of libstdc++" for v in sorted(versions) if v.startswith(("GLIBCXX", "CXX"))]
    tag = re.search(r"-py3-none-manylinux_(\d+)_(\d+)_\w+\.whl$", name)
    if not tag:
        return [*found, f"expected a tag py3-none-manylinux_X_Y_*, got {name}"]
    glibc = [v.removeprefix("GLIBC_") for v in versions if v.startswith("GLIBC_")]
    newest = max(tuple(map(int, v.split("."))) for v in glibc)
    if newest[:2] > (int(tag[1]), int(tag[2])):
        found.append(f"it needs glibc {newest[0]}.{newest[1]}, its tag says {tag[1]}.{tag[2]}")
    return found


def sdist_problems(sdist: Path) -> list[str]:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    found = [f"{name} is missing" for name in sorted((EXPECTED | SOURCES) - names)]
    built = (".so", ".o", ".pyc", ".whl")
    return found + [f"{name} is not a source" for name in sorted(names) if name.endswith(built)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--native", action="store_true", help="a wheel that holds the host library")
    kind.add_argument("--pure", action="store_true", help="a wheel that holds Python only")
    kind.add_argument("--sdist", action="store_true", help="a source distribution")
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    if options.sdist:
        found = sdist_problems(options.file)
    else:
        found = wheel_problems(options.file, options.native)
    print("\n".join([f"{options.file.name}: {len(found)} problems", *found]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
