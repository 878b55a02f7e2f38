"""Compiles and runs the C++ tests of the host library, under sanitizers where there are any."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What threads can race for; a fork under this sanitizer tests only the sanitizer.
THREADED = ["append_writes", "pool_", "help", "worker", "bits", "cancel", "long", "drain", "meet"]
THREADED += ["stuck", "stream", "staging", "results"]
FUZZ_S = 10

pytestmark = pytest.mark.slow


@functools.cache
def links(compiler: str, option: str) -> bool:
    """Whether a program made with this option compiles and runs."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cc"
        # What libFuzzer needs; the others bring a main function of their own.
        entry = 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long)'
        fuzzing = option.endswith("fuzzer")
        source.write_text(f"{entry if fuzzing else 'int main()'} {{ return 0; }}\n")
        program = Path(folder) / "probe"
        command = [compiler, option, str(source), "-o", str(program)]
        built = subprocess.run(command, capture_output=True, check=False)
        run = [program, "-runs=1"] if fuzzing else [program]
        return (
            built.returncode == 0
            and subprocess.run(run, capture_output=True, check=False).returncode == 0
        )


def build(kind: str, *options: str) -> Path:
    """Builds below build/, so that the next run compiles only what has changed."""
    folder = ROOT / "build" / f"native-tests-{kind}"
    folder.mkdir(parents=True, exist_ok=True)
    source = ROOT / "host_ops" / "csrc"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    # Tests of one kind may run in several processes at once.
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            ["cmake", "-S", source, "-B", folder, *generator, "-DFLUXION_TESTS=ON", *options],
            ["cmake", "--build", folder, "--parallel", "2"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
    return folder / "native_tests"


def sanitized(kind: str) -> Path:
    """The folder of the programs under a sanitizer: "address" (with undefined) or "thread"."""
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            if "native" in os.environ.get("FLUXION_REQUIRE", "").split(","):
                pytest.fail(f"native is required by FLUXION_REQUIRE, but {tool} is not installed")
            pytest.skip(f"{tool} is not installed")
    flag = {"address": "-fsanitize=address,undefined", "thread": "-fsanitize=thread"}[kind]
    if not links("c++", flag):
        pytest.skip(f"the compiler cannot link {flag}")
    option = {"address": "-DFLUXION_SANITIZE=ON", "thread": "-DFLUXION_THREAD_SANITIZE=ON"}[kind]
    return build(kind, option)


def run(program: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.mark.parametrize(("kind", "names"), [("address", []), ("thread", THREADED)])
def test_cpp(kind, names):
    done = run(sanitized(kind) / "fluxion_tests", *names)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.native
def test_every_variant_stays_within_its_buffers():
    from host_ops import native

    program = sanitized("address") / "fluxion_tests"
    for variant in native.info()["variants"]:
        done = run(program, "canaries", FLUXION_CPU_VARIANT=variant)
        assert done.returncode == 0, variant + done.stdout + done.stderr


@pytest.mark.parametrize(
    ("kind", "defect", "said"),
    [
        ("address", "bounds", "heap-buffer-overflow"),
        ("address", "overflow", "signed integer overflow"),
        ("thread", "race", "data race"),
    ],
)
def test_a_planted_defect_is_caught(kind, defect, said):
    """Or a clean run under the sanitizer would mean nothing."""
    program = sanitized(kind) / "fluxion_planted"
    assert run(program).returncode == 0
    done = run(program, defect)
    assert done.returncode != 0
    assert said in done.stderr


def test_a_search_for_arguments_that_do_harm(tmp_path):
    clang = shutil.which("clang++")
    if clang is None or not links(clang, "-fsanitize=fuzzer"):
        pytest.skip("no Clang with libFuzzer; test_cpp tries a fixed set of random arguments")
    options = ("-DFLUXION_SANITIZE=ON", "-DFLUXION_FUZZ=ON", f"-DCMAKE_CXX_COMPILER={clang}")
    program = build("fuzz", *options) / "fluxion_fuzz"
    # The highest resident size of a process starts with that of its parent, which here runs many
    # tests: libFuzzer's limit on it would say nothing. Its limit on one allocation does.
    limits = ("-rss_limit_mb=0", "-malloc_limit_mb=512")
    done = run(program, f"-max_total_time={FUZZ_S}", "-max_len=400", *limits, str(tmp_path))
    assert done.returncode == 0, done.stderr[-5000:]
