"""`fluxion bench roundtrip`: what handing one layer's work to the host and back costs by itself."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

import host_ops
from fluxion_jax.bench.stamp import stamp
from fluxion_jax.bench.statistics import summarise
from fluxion_jax.cache.host_kv import memory_sharding
from fluxion_jax.errors import FluxionError
from host_ops import Flush, Work, native

KV_HEADS, GROUP, HEAD_DIM, BLOCKS = 8, 4, 128, 256


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      layers: layers of the shorter and the longer program; what they differ by is the figure.
      repetitions: runs of each program.
    """

    layers: tuple[int, int] = (32, 96)
    repetitions: int = 50


def run(settings: Settings = Settings()) -> dict[str, Any]:
    """Measures a submit and a collect without work, one layer after another.

    Shapes are those of a layer of an 8B model (8 KV heads of 4 query heads, head size 128, batch 1,
    bfloat16) with 4096 tokens in the host cache. The time of a layer is what a program of more
    layers takes longer, over the number of layers more, so that starting a program does not count.

    Args:
      settings: what is measured.

    Raises:
      FluxionError: the native library cannot be used, or a step failed.
    """
    if reason := native.unavailable_reason():
        raise FluxionError(f"expected the native host library, got none: {reason}")
    few, many = settings.layers
    rows = []
    for handed_over in (False, True):
        short_s, long_s = (
            _times_s(layers, settings.repetitions, handed_over) for layers in (few, many)
        )
        medians_s = summarise(short_s)["median"], summarise(long_s)["median"]
        rows.append(
            {
                "selection": "handed over" if handed_over else "none",
                "layer_us": 1e6 * (medians_s[1] - medians_s[0]) / (many - few),
                "least_layer_us": 1e6 * (min(long_s) - min(short_s)) / (many - few),
                "program_s": {str(few): summarise(short_s), str(many): summarise(long_s)},
            }
        )
    return {
        "benchmark": "roundtrip",
        "stamp": stamp(),
        "platform": jax.default_backend(),
        "synchronisation": native.info()["cuda"],
        "settings": dataclasses.asdict(settings),
        "rows": rows,
    }


def render(report: dict[str, Any]) -> str:
    """The report as a table for a terminal."""
    how = report["synchronisation"] or "calls of the CPU backend"
    lines = [
        f"round trip of a layer without work, {report['platform']}, {how}",
        "selection      median    least",
    ]
    for r in report["rows"]:
        lines.append(f"{r['selection']:12s} {r['layer_us']:6.1f} us {r['least_layer_us']:6.1f} us")
    return "\n".join(lines)


def _times_s(layers: int, repetitions: int, handed_over: bool) -> list[float]:
    """Wall times of a program of this many layers."""
    work, cache, flush = _operands(handed_over)

    def chain(cache: Any, work: Work, flush: Flush) -> Any:
        q, status = work.q, jnp.zeros(1, jnp.int32)
        for _ in range(layers):
            now = work._replace(q=q)
            k, v, summaries = cache
            tick = host_ops.submit(now, k, v, summaries, scale=0.1, implementation="native")
            done = host_ops.collect(
                tick, now, k, v, summaries, flush, (), scale=0.1, implementation="native"
            )
            cache = (done.k, done.v, done.summaries)
            q, status = q + done.out, status | done.status
        return cache, q, status

    pinned, device = memory_sharding("pinned_host"), memory_sharding("device")
    program = jax.jit(chain, donate_argnums=0, out_shardings=((pinned,) * 3, device, device))
    taken_s = []
    for _ in range(repetitions + 1):
        start_s = time.perf_counter()
        cache, _, status = jax.block_until_ready(program(cache, work, flush))
        taken_s.append(time.perf_counter() - start_s)
        if int(status[0]) != host_ops.STATUS_OK:
            raise FluxionError(f"expected status 0, got {int(status[0])}")
    return taken_s[1:]


def _operands(handed_over: bool) -> tuple[Work, tuple[jax.Array, ...], Flush]:
    """Work that gives the host nothing to do, a cache of zeros, and no block to write."""
    heads, groups = (1, KV_HEADS * GROUP), (1, KV_HEADS)
    block = (*groups, 1, 16, HEAD_DIM)
    cache = (*groups, BLOCKS, 16, HEAD_DIM)
    rows = (*groups, BLOCKS * 15 // 8, 2, HEAD_DIM)
    work = Work(
        q=jnp.ones((*heads, HEAD_DIM), jnp.float32),
        q8=jnp.ones((*heads, HEAD_DIM), jnp.int8),
        granularity=jnp.full(groups, 16, jnp.int32),
        k_units=jnp.ones(heads, jnp.int32),
        shared=jnp.zeros(groups, jnp.int32),
        host_blocks=jnp.full(1, BLOCKS, jnp.int32),
        boundary=jnp.zeros(groups, jnp.int32),
        cancel=jnp.zeros(1, jnp.int32),
        bitmap=jnp.zeros((*heads, BLOCKS // 32), jnp.uint32) if handed_over else None,
    )
    flush = Flush(
        jnp.zeros(block, jnp.bfloat16),
        jnp.zeros(block, jnp.bfloat16),
        jnp.zeros((*groups, 1, 2, HEAD_DIM), jnp.int8),
        jnp.zeros((*groups, HEAD_DIM), jnp.int32),
        jnp.zeros(1, jnp.int32),
        jnp.zeros(1, jnp.int32),
    )
    zeros = (
        jnp.zeros(cache, jnp.bfloat16),
        jnp.zeros(cache, jnp.bfloat16),
        jnp.zeros(rows, jnp.int8),
    )
    pinned, device = memory_sharding("pinned_host"), memory_sharding("device")
    return (
        jax.device_put(work, device),
        tuple(jax.device_put(x, pinned) for x in zeros),
        jax.device_put(flush, device),
    )
