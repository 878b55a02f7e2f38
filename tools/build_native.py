"""Builds the host library in place, into host_ops/_native, for work on this tree.

Only what changed is compiled again. The FFI headers are those of the jaxlib installed next to this
interpreter; a library built with newer headers is refused by an older jaxlib, so it is built anew
when the present jaxlib is older than the one it was built with.

Exit status: 0, also without a library unless `--require` is given, for the package runs without.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def jaxlib_version() -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version("jaxlib").split(".")[:3])


def run(command: list[str], log: Path) -> bool:
    """Runs a command, keeping its output in `log`; says whether it succeeded."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    with log.open("a") as output:
        output.write("$ " + " ".join(command) + "\n")
        output.flush()
        try:
            done = subprocess.run(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PATH": path},
                check=False,
            )
        except OSError as error:
            output.write(f"{error}\n")
            return False
    return done.returncode == 0


def build(root: Path, build_dir: Path) -> str | None:
    """Builds and installs into `root`; returns why it could not, or None."""
    source = root / "host_ops" / "csrc"
    if not (source / "CMakeLists.txt").is_file():
        return f"{source / 'CMakeLists.txt'} does not exist"
    headers = build_dir / "jaxlib-version"
    if headers.is_file():
        built_with = tuple(map(int, headers.read_text().split(".")))
        if jaxlib_version() >= built_with and run_all(compile_steps(build_dir, root), build_dir):
            return None
        # Besides the headers, what it was configured with may be gone, such as an environment.
    shutil.rmtree(build_dir, ignore_errors=True)
    build_dir.mkdir(parents=True)
    generator = ["-G", "Ninja"] if find_ninja() else []
    settings = ["-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}"]
    configure = ["cmake", "-S", str(source), "-B", str(build_dir), *generator, *settings]
    if not run_all([configure, *compile_steps(build_dir, root)], build_dir):
        print((build_dir / "build.log").read_text()[-6000:], file=sys.stderr)
        return f"all output of the build is in {build_dir / 'build.log'}"
    headers.write_text(".".join(map(str, jaxlib_version())))
    return None


def compile_steps(build_dir: Path, root: Path) -> list[list[str]]:
    return [
        ["cmake", "--build", str(build_dir), "--parallel", str(len(os.sched_getaffinity(0)))],
        ["cmake", "--install", str(build_dir), "--prefix", str(root)],
    ]


def run_all(steps: list[list[str]], build_dir: Path) -> bool:
    log = build_dir / "build.log"
    log.unlink(missing_ok=True)
    return all(run(step, log) for step in steps)


def find_ninja() -> bool:
    return bool(shutil.which("ninja") or (Path(sys.executable).parent / "ninja").exists())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="tree to build (default: this one)")
    parser.add_argument("--require", action="store_true", help="exit with 1 if it cannot be built")
    options = parser.parse_args()
    root = options.root.resolve()
    reason = build(root, root / "build" / "native")
    library = root / "host_ops" / "_native" / "libfluxion_host.so"
    if reason is None and not library.is_file():
        reason = f"the build left no {library}"
    if reason is None:
        print(f"host library: {library}")
        return 0
    # An older library must not stand in for what could not be built.
    library.unlink(missing_ok=True)
    print(
        f"The native host library could not be built: {reason}.\n"
        "Everything works without it, through slower JAX and NumPy code. To get it, install a C++17"
        " compiler (g++ or clang++) and run the same command again.",
        file=sys.stderr,
    )
    return 1 if options.require else 0


if __name__ == "__main__":
    sys.exit(main())
