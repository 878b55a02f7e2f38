"""Compiles and runs the C++ tests of the host library, under sanitizers where there are any."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What threads can race for; a fork under this sanitizer tests only the sanitizer.
THREADED = ["append_writes", "pool_", "help", "worker", "bits", "cancel", "long", "drain", "meet"]


def sanitizer_works(folder: Path, option: str) -> bool:
    source = folder / "probe.cc"
    source.write_text("int main() { return 0; }\n")
    program = folder / "probe"
    built = subprocess.run(
        ["c++", option, str(source), "-o", str(program)], capture_output=True, check=False
    )
    return built.returncode == 0 and subprocess.run([program], check=False).returncode == 0


def build(kind: str, option: str) -> Path:
    """Builds below build/, so that the next run compiles only what has changed."""
    folder = ROOT / "build" / f"native-tests-{kind}"
    source = ROOT / "host_ops" / "csrc"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    for command in (
        ["cmake", "-S", source, "-B", folder, *generator, "-DFLUXION_TESTS=ON", option],
        ["cmake", "--build", folder, "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "native_tests" / "fluxion_tests"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "option", "probe", "names"),
    [
        ("address", "-DFLUXION_SANITIZE=ON", "-fsanitize=address,undefined", []),
        ("thread", "-DFLUXION_THREAD_SANITIZE=ON", "-fsanitize=thread", THREADED),
    ],
)
def test_cpp(tmp_path, kind, option, probe, names):
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            if "native" in os.environ.get("FLUXION_REQUIRE", "").split(","):
                pytest.fail(f"native is required by FLUXION_REQUIRE, but {tool} is not installed")
            pytest.skip(f"{tool} is not installed")
    if not sanitizer_works(tmp_path, probe):
        pytest.skip(f"the compiler cannot link {probe}")
    done = subprocess.run(
        [build(kind, option), *names], capture_output=True, text=True, timeout=500, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
