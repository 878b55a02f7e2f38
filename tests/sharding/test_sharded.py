"""KV heads over several devices, and over two processes: the answers of one device."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.sharding import steps

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
pytestmark = pytest.mark.slow


def start(script: str, *arguments: object, devices: int) -> subprocess.Popen[str]:
    # Every process compiles for itself; what is compiled fast says as much.
    fast = "--xla_backend_optimization_level=0"
    flags = (
        f"{os.environ.get('XLA_FLAGS', '')} {fast} --xla_force_host_platform_device_count={devices}"
    )
    return subprocess.Popen(
        [sys.executable, HERE / script, *map(str, arguments)],
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 900) -> Any:
    try:
        out, errors = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-4000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def found() -> Any:
    return finish(start("one_process.py", devices=8))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_any_number_of_devices_gives_the_answers_of_one(found: Any, size: int) -> None:
    here = found["sizes"][str(size)]
    assert (here["devices"], here["heads"], here["kind"]) == (size, 8 // size, "pinned_host")
    # What is read does not depend on the devices; sums over keys are the same up to rounding.
    assert here["same_selection"] is True
    assert here["out"] < 2e-6


def test_prefill_sliding_layers_and_both_sides_of_the_split(found: Any) -> None:
    assert (found["everything"]["selection"], found["everything"]["blocks"]) == (0, 0)
    assert found["everything"]["prefill"] < 2e-6
    assert found["everything"]["decode"] < 2e-6


def test_a_cache_moves_between_numbers_of_devices(found: Any) -> None:
    assert [x["devices"] for x in found["moved"]] == [1, 2, 4]
    assert found["same"] == [True, True]
    assert found["forked"] is True
    assert found["lengths"] == [0, 111]


def test_generate_is_the_same_on_a_mesh(found: Any) -> None:
    assert found["generation"]["same_tokens"] is True
    assert found["generation"]["log_probs"] < 1e-5


def test_generation_on_a_mesh_compiles_once(found: Any) -> None:
    """All chunks of prompt and answer share a program, and a second generation compiles nothing."""
    first, again = found["generation"]["compilations"]
    assert first[:2] == [1, 1]
    assert again == [0, 0, 0]


@pytest.mark.parametrize(
    ("index", "text"),
    [
        (0, "ConfigError: expected the number of KV heads to be a multiple of the 3 devices"),
        (1, "ConfigError: expected axis to be one of the mesh's ('heads',), got 'layers'"),
        (2, "ConfigError: expected a mesh with the axis 'heads', got none"),
        (3, "UnsupportedError: expected measure=False for a cache on several devices"),
        (4, "FluxionError: a step failed (status 16): expected the host cache to be updated in"),
    ],
)
def test_errors(found: Any, index: int, text: str) -> None:
    assert found["errors"][index].startswith(text)


def test_two_processes_give_the_answers_of_one_device(tmp_path: Path) -> None:
    expected, _ = steps.run_global(None)
    np.savez(tmp_path / "one.npz", **expected)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    arguments = [(address, rank, tmp_path / "one.npz") for rank in range(2)]
    processes = [start("two_processes.py", *each, devices=2) for each in arguments]
    for rank, process in enumerate(processes):
        here = finish(process)
        assert (here["rank"], here["devices"], here["local"]) == (rank, 4, 2)
        assert here["same_selection"] is True
        assert here["out"] < 2e-6
        assert here["fork"].startswith("UnsupportedError: expected a cache whose devices all")
        assert here["save"].startswith("UnsupportedError: expected a cache whose devices all")
