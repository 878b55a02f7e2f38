"""When each part of a decode step ran: one step under JAX's profiler, on the CPU backend.

The profiler knows when the program called the host and when it went on; what the host's threads did
in between is in the step's `host_times_s`, from the library's own clocks. Together they show what
overlaps. On a GPU the foreign calls run ahead of the stream, so there it takes a viewer of traces.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import numpy.typing as npt

from fluxion_jax.attention import LayerStats
from fluxion_jax.errors import FluxionError, UnsupportedError

# What a layer calls, in this order: submit, collect.
_CALLS = 2
# Names that releases of JAX give to foreign calls.
_CALL_NAMES = ("ffi_call", "custom-call", "custom_call")


@dataclasses.dataclass(frozen=True)
class StepTimeline:
    """Seconds since the step's program began; `[L]` is the layers with a host cache.

    Attributes:
      submit_s: float64 `[L]`, the work was handed to the host's threads.
      share_s: float64 `[L]`, the hand-over had returned and the device began with its own share.
      collect_s: float64 `[L]`, the device was through with it and asked for the host's result.
      done_s: float64 `[L]`, it had the result, and the leaving block was written.
      end_s: the program ended.
      host_times_s: float64 `[L, 9]`, in the order of `host_ops.TIMES`.
    """

    submit_s: npt.NDArray[np.float64]
    share_s: npt.NDArray[np.float64]
    collect_s: npt.NDArray[np.float64]
    done_s: npt.NDArray[np.float64]
    end_s: float
    host_times_s: npt.NDArray[np.float64]


def profile_step(run: Callable[[], LayerStats]) -> StepTimeline:
    """Runs one decode step under the profiler.

    Args:
      run: runs one compiled decode step with host work, which must have been compiled before, and
        returns its statistics, arrays with a leading axis of layers.

    Returns:
      When what happened. The profiler costs time itself, a few microseconds for each operation.

    Raises:
      UnsupportedError: the backend is not the CPU.
      FluxionError: no layer of the step called the native host operations, or not as expected.
    """
    if jax.default_backend() != "cpu":
        raise UnsupportedError(
            f"expected the CPU backend, got {jax.default_backend()}; record a trace with "
            "jax.profiler.trace and open it in a viewer"
        )
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 3
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            stats = jax.block_until_ready(run())
        (trace,) = Path(folder).rglob("*.trace.json.gz")
        operations = _operations(trace)
    times = np.asarray(stats.host_times_s, np.float64)
    calls = [op for op in operations if op[2].startswith(_CALL_NAMES)]
    layers = len(times)
    if times.ndim != 2 or len(calls) != _CALLS * layers:
        raise FluxionError(
            f"expected {_CALLS} calls of native host operations in each of {layers} layers, got "
            f"{len(calls)} calls; run one compiled step of a cache with a host part, whose split "
            "leaves work to the host"
        )
    begin = min(op[0] for op in operations)
    end = max(op[1] for op in operations)
    edges = 1e-6 * (np.asarray([op[:2] for op in calls]).reshape(layers, _CALLS, 2) - begin)
    return StepTimeline(
        submit_s=edges[:, 0, 0],
        share_s=edges[:, 0, 1],
        collect_s=edges[:, 1, 0],
        done_s=edges[:, 1, 1],
        end_s=1e-6 * (end - begin),
        host_times_s=times,
    )


def _operations(trace: Path) -> list[tuple[float, float, str]]:
    """Begin, end in microseconds, and name of each operation of the largest program, by begin.

    Of several as large it is the last: a step before it may still have been running.
    """
    programs: dict[str, list[tuple[float, float, str]]] = {}
    for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]:
        told = event.get("args", {})
        if "hlo_op" in told:
            begin, duration = float(event["ts"]), float(event.get("dur", 0.0))
            operation = begin, begin + duration, str(told["hlo_op"])
            programs.setdefault(str(told.get("run_id")), []).append(operation)
    found = [sorted(program) for program in programs.values()]
    return max(found, key=lambda program: (len(program), program[0]), default=[])
