"""GPU idle: the share of decode steps in which no kernel runs, out of a profiler's trace."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from fluxion_jax.errors import FluxionError

_MOST_NAMED = 12
# The kernel that hands a layer over and waits for the host does no work.
_WAITING = ("fluxion_exchange",)


def idle_share(run: Callable[[], Any]) -> dict[str, Any]:
    """Runs something under the profiler and looks at when kernels ran.

    Args:
      run: enqueues compiled work on a GPU and waits for it.

    Returns:
      JSON-ready: `idle_fraction` of the time from the first kernel to the end of the last in which
      none runs that works, copies included; `waiting_fraction`, in which only one runs that waits
      for the host (part of the idle share); `working_s`, in which one works; `kernels_s`, time by
      kernel, the longest first.

    Raises:
      FluxionError: the trace shows no kernels.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (trace,) = Path(folder).rglob("*.trace.json.gz")
        return shares(json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"])


def shares(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of `idle_share` out of a trace's events."""
    told = [e for e in events if e.get("ph") == "M"]
    devices = {
        e["pid"]
        for e in told
        if e.get("name") == "process_name" and "/device:GPU" in e["args"]["name"]
    }
    streams = {
        (e["pid"], e["tid"])
        for e in told
        if e.get("name") == "thread_name"
        and e["pid"] in devices
        and e["args"]["name"].startswith("Stream")
    }
    kernels = [
        (float(e["ts"]), float(e["ts"]) + float(e.get("dur", 0.0)), str(e["name"]))
        for e in events
        if e.get("ph") == "X" and (e["pid"], e["tid"]) in streams
    ]
    if not kernels:
        raise FluxionError("expected kernels in the trace of the profiler, got none; is it a GPU?")
    span = max(k[1] for k in kernels) - min(k[0] for k in kernels)
    working = _covered([k for k in kernels if not k[2].startswith(_WAITING)])
    by_name: Counter[str] = Counter()
    for begin, end, name in kernels:
        by_name[name] += end - begin  # type: ignore[assignment]
    return {
        "idle_fraction": 1.0 - working / span,
        "waiting_fraction": (_covered(kernels) - working) / span,
        "working_s": 1e-6 * working,
        "kernels_s": {name: 1e-6 * us for name, us in by_name.most_common(_MOST_NAMED)},
    }


def _covered(intervals: list[tuple[float, float, str]]) -> float:
    """Length of the union of intervals."""
    covered, reached = 0.0, float("-inf")
    for begin, end, _ in sorted(intervals):
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered
