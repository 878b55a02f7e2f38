"""Programs and processes that share the library: forks, devices, few and many CPUs."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from host_ops import Collected, native
from tests.host_ops import cases

# Subprocesses that import JAX; what they test does not depend on its version.
pytestmark = [pytest.mark.native, pytest.mark.slow]

SETTINGS = ("FLUXION_NUM_THREADS", "FLUXION_CPUS", "FLUXION_SPIN_US")
# Long enough for several parts of each stage.
SHAPE = cases.Shape(num_blocks=1040, dtype="bfloat16")


def digest(result: Collected) -> str:
    """Names the bits of a result."""
    hashed = hashlib.sha256()
    for name in ("out", "lse", "selection", "blocks_read", "status"):
        hashed.update(np.ascontiguousarray(getattr(result, name)).tobytes())
    return hashed.hexdigest()[:16]


def run_here() -> str:
    return digest(cases.run("native", cases.random_case(SHAPE, seed=3)))


def run_elsewhere(script: str, **environment: str) -> list[str]:
    """Runs a script in a process of its own; returns the words it prints."""
    inherited = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    start = "from host_ops import native\nfrom tests.host_ops.test_concurrency import *\n"
    done = subprocess.run(
        [sys.executable, "-c", start + script],
        env=inherited | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_few_and_many_cpus_give_the_same_bits():
    last = str(max(os.sched_getaffinity(0)))
    report = (
        "about = native.info(); print(run_here(), about['threads'], about['cpus'], "
        "about['cpu_list'])"
    )
    confine = f"os.sched_setaffinity(0, {{{last}}})\n"
    cpus = str(native.info()["cpus"])
    bits = run_here()
    assert run_elsewhere(confine + report) == [bits, "1", "1", last]
    # More threads than this machine has CPUs, spinning and not.
    crowd = {"FLUXION_NUM_THREADS": "16"}
    assert run_elsewhere(report, **crowd)[:3] == [bits, "16", cpus]
    assert run_elsewhere(confine + report, **crowd, FLUXION_SPIN_US="0") == [bits, "16", "1", last]
    assert run_elsewhere(report, FLUXION_CPUS=last) == [bits, "1", cpus, last]


FORK = """
import multiprocessing

def child(queue):
    # The parent's threads do not exist here.
    native.set_threads(3)
    queue.put((native.drain(), native.info()["threads"], native.info()["in_flight"]))

native.set_threads(3)
before = run_here()
fork = multiprocessing.get_context("fork")
queue = fork.SimpleQueue()
children = [fork.Process(target=child, args=(queue,)) for _ in range(2)]
for process in children:
    process.start()
during = run_here()
for process in children:
    process.join(60)
    assert process.exitcode == 0, process.exitcode
    assert queue.get() == (0, 3, 0)
print(before, during, run_here())
"""


def test_a_process_forks_with_a_live_pool():
    assert run_elsewhere(FORK) == [run_here()] * 3


DEVICES = """
import jax
from jax.sharding import SingleDeviceSharding

devices = jax.devices()
assert len(devices) == 8, devices
case = cases.random_case(SHAPE, seed=3)
program = cases.jitted_step("native")

def start(device, cache):
    work, flush = jax.device_put((case.work, case.flush), device)
    return program(work, *cache, flush, scale=case.scale)

def host_cache(device):
    pinned = SingleDeviceSharding(device, memory_kind="pinned_host")
    return jax.device_put((case.k, case.v, case.summaries), pinned)

caches = [host_cache(device) for device in devices]
for _ in range(3):
    results = [start(device, cache) for device, cache in zip(devices, caches)]
    caches = [(x.k, x.v, x.summaries) for x in results]
assert [x.out.devices() for x in results] == [{device} for device in devices]
print(*[digest(jax.tree.map(np.asarray, x)) for x in results], native.info()["in_flight"])
"""


def test_eight_devices_run_one_function_each_on_its_own_cache():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    assert run_elsewhere(DEVICES, XLA_FLAGS=flags) == [run_here()] * 8 + ["0"]
