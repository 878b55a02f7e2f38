"""An import is quick, and leaves the process, its environment and the disk as they were."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 1.0

# Everything beyond JAX counts, Flax too, which every user of the package has to have. CPU seconds:
# an import does nothing but compute, and other processes hardly change them.
TIMED = """
import json, os, sys, threading, time
import jax
from jax._src import xla_bridge

HANDLED = ("SigBlk", "SigIgn", "SigCgt")

def process():
    return {
        "environment": dict(os.environ),
        "threads": len(os.listdir("/proc/self/task")),
        "python threads": [thread.name for thread in threading.enumerate()],
        "folder": os.getcwd(),
        "files": sorted(os.listdir(".")),
        "signals": [line for line in open("/proc/self/status") if line[:6] in HANDLED],
        "path": list(sys.path),
        "options": {name: repr(value) for name, value in jax.config.values.items()},
    }

def difference(old, new):
    if not isinstance(old, dict):
        return [old, new]
    return {k: [old.get(k), new.get(k)] for k in old | new if old.get(k) != new.get(k)}

written = []
def audit(event, arguments):
    if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        written.append(str(arguments[0]))
    elif event in ("os.mkdir", "os.rename", "os.remove", "socket.connect", "subprocess.Popen"):
        written.append(f"{event} {arguments}")

before = process()
sys.addaudithook(audit)
start = time.process_time()
import fluxion_jax
seconds = time.process_time() - start
after = process()
print(json.dumps({
    "seconds": seconds,
    "changed": {k: difference(before[k], after[k]) for k in before if before[k] != after[k]},
    "written": written,
    "backends": xla_bridge.backends_are_initialized(),
}))
"""


def imported(folder: Path) -> dict[str, Any]:
    """What happens in a new process, in an empty folder."""
    done = subprocess.run(
        [sys.executable, "-c", TIMED],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def imports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("elsewhere")
    return [imported(folder) for _ in range(3)]


def test_an_import_takes_less_than_a_second_beyond_that_of_jax(
    imports: list[dict[str, Any]],
) -> None:
    assert min(found["seconds"] for found in imports) < LIMIT_S


def test_an_import_changes_nothing(imports: list[dict[str, Any]]) -> None:
    # The first may have written the bytecode of files that were not compiled before.
    found = imports[-1]
    assert found["changed"] == {}
    assert found["written"] == []
    assert not found["backends"]
