"""`fluxion bench machine`: what the machine's memories and buses can deliver."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fluxion_jax.bench.random_arrays import random_array
from fluxion_jax.bench.stamp import cache_bytes, stamp
from fluxion_jax.bench.statistics import summarise
from fluxion_jax.cache.host_kv import memory_sharding
from fluxion_jax.env import free_bytes
from fluxion_jax.errors import FluxionError
from fluxion_jax.policy.cost_model import CostModel
from host_ops import ceiling, native

# The part of the rate of copies that the device's kernel reaches, which reads selected blocks
# within a step: 46 to 49 GB/s where copies reach 52 (H100, PCIe 5). A model that promises the
# kernel all of it gives the device too much, and the host ends early and waits.
KERNEL_OF_COPIES = 0.92

_DEVICE = jax.memory.Space.Device
_HOST = jax.memory.Space.Host


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      array_bytes: of the array that is read and copied; None for 1 GiB, less where caches are
        small or memory is short.
      repetitions: of each figure.
      roundtrip_layers: layers of the two programs whose difference is a hand-over; None to leave
        the hand-over out.
    """

    array_bytes: int | None = None
    repetitions: int = 7
    roundtrip_layers: tuple[int, int] | None = (8, 24)


def run(settings: Settings = Settings(), say: Callable[[str], None] = lambda _: None) -> Any:
    """Measures each pipe alone, and host reads and pinned copies at once.

    Rates are of 10^9 bytes per second; a copy within the device counts what it reads and writes.
    On a machine without a GPU only the host's part is there.

    Args:
      settings: what is measured.
      say: told in one line what is measured next.

    Raises:
      FluxionError: the native library cannot be used.
    """
    if reason := native.unavailable_reason():
        raise FluxionError(f"expected the native host library, got none: {reason}")
    size = settings.array_bytes or _array_bytes()
    on_gpu = jax.default_backend() == "gpu"
    array = random_array((size // 2,), jnp.bfloat16, "pinned_host")
    rows = _host_rows(array, settings, say)
    host = rows[-1]["gb_s"]["median"]
    together = None
    if on_gpu:
        say("copies")
        rows += _copy_rows(array, settings)
        say("host and bus at once")
        h2d = next(r for r in rows if r["pipe"] == "host to device")["gb_s"]["median"]
        together = _together(array, host, h2d, settings)
    handover_us = None
    if settings.roundtrip_layers:
        from fluxion_jax.bench import roundtrip

        say("hand-over")
        layers = roundtrip.Settings(settings.roundtrip_layers, 3 * settings.repetitions)
        handover_us = roundtrip.run(layers)["rows"][-1]["layer_us"]
    return {
        "benchmark": "machine",
        "stamp": stamp(),
        "settings": {**dataclasses.asdict(settings), "array_bytes": size},
        "rows": rows,
        "together": together,
        "handover_us": handover_us,
        "cost_model": _cost_model(host, together, handover_us),
    }


def _array_bytes() -> int:
    last = max(cache_bytes().values(), default=0)
    free = free_bytes()
    size = max(2**30, 4 * last)
    return max(2**22, min(size, (free if free is not None else size * 8) // 8)) // 8 * 8


def _host_rows(
    array: jax.Array, settings: Settings, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Streaming reads by 1, 2, 4 ... threads, the last by as many as work by default."""
    default = native.info()["threads"]
    counts = sorted({*(2**i for i in range(10) if 2**i < default), default})
    view = np.asarray(array)
    rows = []
    try:
        for threads in counts:
            say(f"host read by {threads} threads")
            native.set_threads(threads)
            ceiling.read_all(view)
            seconds = [ceiling.read_all(view)[0] for _ in range(settings.repetitions)]
            rates = [array.nbytes / s / 1e9 for s in seconds]
            rows.append({"pipe": "host read", "threads": threads, "gb_s": summarise(rates)})
    finally:
        native.set_threads(default)
    return rows


def _copy_rows(array: jax.Array, settings: Settings) -> list[dict[str, Any]]:
    on_device, to_host = jax.block_until_ready(_to_device(array)), _to_host()
    copies: dict[str, tuple[Callable[[], Any], float]] = {
        "host to device": (lambda: _to_device(array), array.nbytes),
        "device to host": (lambda: to_host(on_device), array.nbytes),
        # Several in flight, so that starting them does not count.
        "device copy": (
            lambda: [_within_device(on_device) for _ in range(_COPIES)],
            2 * _COPIES * array.nbytes,
        ),
    }
    rows = []
    for name, (copy, size) in copies.items():
        jax.block_until_ready(copy())
        rates = []
        for _ in range(settings.repetitions):
            start = time.perf_counter()
            jax.block_until_ready(copy())
            rates.append(size / (time.perf_counter() - start) / 1e9)
        rows.append({"pipe": name, "threads": None, "gb_s": summarise(rates)})
    return rows


_COPIES = 4


@jax.jit
def _to_device(x: jax.Array) -> jax.Array:
    return jax.device_put(x, _DEVICE)


@jax.jit
def _within_device(x: jax.Array) -> jax.Array:
    return jnp.copy(x)


def _to_host() -> Any:
    sharding = memory_sharding("pinned_host")
    return jax.jit(lambda x: jax.device_put(x, _HOST), out_shardings=sharding)


def _together(
    array: jax.Array, host_gb_s: float, h2d_gb_s: float, settings: Settings
) -> dict[str, Any]:
    """Host reads and pinned copies at once, in such numbers that they should end together."""
    copies = 4
    view = np.asarray(array)
    reads = max(1, round(copies * host_gb_s / h2d_gb_s))
    figures: dict[str, list[float]] = {"host_gb_s": [], "pcie_gb_s": [], "sum_gb_s": []}
    for _ in range(settings.repetitions):
        done: list[float] = []
        start = time.perf_counter()
        waiter = threading.Thread(
            target=_note_end, args=([_to_device(array) for _ in range(copies)], done)
        )
        waiter.start()
        for _ in range(reads):
            ceiling.read_all(view)
        host_s = time.perf_counter() - start
        waiter.join()
        pcie_s = done[0] - start
        figures["host_gb_s"].append(reads * array.nbytes / host_s / 1e9)
        figures["pcie_gb_s"].append(copies * array.nbytes / pcie_s / 1e9)
        # Over the longer of the two, so that what does not overlap is not counted as if it did.
        total = (reads + copies) * array.nbytes
        figures["sum_gb_s"].append(total / max(host_s, pcie_s) / 1e9)
    return {name: summarise(values) for name, values in figures.items()}


def _note_end(results: list[jax.Array], done: list[float]) -> None:
    jax.block_until_ready(results)
    done.append(time.perf_counter())


def cost_at(host_gb_s: float, copies_gb_s: float) -> CostModel:
    """A cost model from the ceilings of both sides; fixed costs keep their defaults.

    Args:
      host_gb_s: at which the host's threads stream.
      copies_gb_s: of copies to the device.
    """
    return CostModel(1e9 * host_gb_s, 1e9 * KERNEL_OF_COPIES * copies_gb_s)


def _cost_model(
    host_gb_s: float, together: dict[str, Any] | None, handover_us: float | None
) -> dict[str, float]:
    """What `split="model:FILE"` reads: rates at once; what was not measured keeps its default."""
    model = CostModel(host_bytes_per_s=1e9 * host_gb_s)
    if together:
        model = cost_at(together["host_gb_s"]["median"], together["pcie_gb_s"]["median"])
    if handover_us:
        model = dataclasses.replace(model, host_fixed_s=max(0.0, 1e-6 * handover_us))
    return dataclasses.asdict(model)


def render(report: dict[str, Any]) -> str:
    """The report as a table for a terminal."""
    lines = ["pipe               threads  median GB/s      min      max"]
    for r in report["rows"]:
        rate = r["gb_s"]
        lines.append(
            f"{r['pipe']:18s} {r['threads'] or '':>7} {rate['median']:12.1f} {rate['min']:8.1f} "
            f"{rate['max']:8.1f}"
        )
    if report["together"]:
        parts = (f"{k.split('_')[0]} {v['median']:.1f}" for k, v in report["together"].items())
        lines.append("at once, GB/s: " + ", ".join(parts))
    if report["handover_us"] is not None:
        lines.append(f"hand-over of a layer without work: {report['handover_us']:.1f} us")
    return "\n".join(lines)
