"""`fluxion bench device`: block-sparse attention on a GPU against what its buses can deliver."""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import host_ops
from fluxion_jax.bench.cells import cell
from fluxion_jax.bench.device_kernels import KERNELS, Kernel
from fluxion_jax.bench.stamp import stamp
from fluxion_jax.bench.statistics import summarise
from fluxion_jax.cache.host_kv import memory_sharding

KV_HEADS = 8
GROUP = 4
HEAD_DIM = 128
BLOCK_TOKENS = 16
SELECTIONS = 4
"""Random selections that the calls of a program take in turn, so that none finds its blocks in the
cache of the GPU."""

DEVICE_CALLS = 10


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured, all of it for 8 KV heads, 4 queries each, head size 128 and batch 1.

    Attributes:
      kernels: names in `fluxion_jax.bench.device_kernels.KERNELS`.
      places: memory kinds of the cache, out of "pinned_host" and "device".
      granularities: tokens of a unit.
      cache_bytes: K and V of the cache.
      read_bytes: K and V that one call reads.
      calls: of the kernel in one program over pinned memory, at least; over device memory, where
        a call is that much shorter beside the start of a program, `DEVICE_CALLS` times as many.
      repetitions: of each figure.
    """

    kernels: tuple[str, ...] = tuple(KERNELS)
    places: tuple[str, ...] = ("pinned_host", "device")
    granularities: tuple[int, ...] = (16, 64)
    cache_bytes: int = 2**30
    read_bytes: int = 2**26
    calls: int = 20
    repetitions: int = 7


QUICK = Settings(
    kernels=("triton", "triton_mma", "wgmma", "mosaic", "in-tree paged"),
    granularities=(16,),
    repetitions=5,
)


def run(
    settings: Settings = Settings(),
    folder: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measures the ceilings and every kernel, over blocks in each place.

    Args:
      settings: what is measured.
      folder: where finished cells are kept and looked for; None keeps nothing.
      say: told in one line what is measured next.
    """
    rows = []
    for place in settings.places:
        rows += _place_rows(place, settings, folder, say)
    return {
        "benchmark": "device",
        "stamp": stamp(),
        "settings": {
            **dataclasses.asdict(settings),
            "kv_heads": KV_HEADS,
            "group": GROUP,
            "head_dim": HEAD_DIM,
        },
        "rows": rows,
    }


def _place_rows(
    place: str, settings: Settings, folder: Path | None, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    # Built by the first cell that has to be measured, and gone with the last.
    bench = functools.cache(functools.partial(_Bench, place, settings))

    def measure(name: str, granularity: int) -> dict[str, Any]:
        say(f"{place}, unit {granularity}, {name}")
        return bench().measure(name, granularity)

    sizes = f"{settings.cache_bytes}-{settings.read_bytes}"
    return [
        cell(
            folder,
            f"device-{sizes}-{place}-{granularity}-{name}".replace(" ", "_"),
            functools.partial(measure, name, granularity),
        )
        for granularity in settings.granularities
        for name in settings.kernels
        if place in KERNELS[name].places
        and (granularity == BLOCK_TOKENS or not KERNELS[name].any_granularity_alike)
    ]


class _Bench:
    """A cache in one place, its ceiling, and programs that read it."""

    def __init__(self, place: str, settings: Settings) -> None:
        self.place, self.settings = place, settings
        times = DEVICE_CALLS if place == "device" else 1
        self.calls = -(-settings.calls * times // SELECTIONS) * SELECTIONS
        self.block_bytes = 2 * 2 * BLOCK_TOKENS * HEAD_DIM
        self.blocks = settings.cache_bytes // (KV_HEADS * self.block_bytes)
        shape = (1, KV_HEADS, self.blocks, BLOCK_TOKENS, HEAD_DIM)
        self.k, self.v = (_random_array(shape, seed, place) for seed in (1, 2))
        self.q = jax.random.normal(jax.random.key(3), (1, KV_HEADS * GROUP, HEAD_DIM))
        self.programs: dict[str, tuple[Any, Any, Any]] = {}

    def ceiling_gb_s(self) -> float:
        """Pinned memory to the device, or device memory read and written; 10^9 bytes a second."""
        copies, factor = (2, 1) if self.place == "pinned_host" else (10, 2)
        seconds = _seconds(lambda: [_copy(self.k) for _ in range(copies)])
        return factor * copies * self.k.nbytes / seconds / 1e9

    def measure(self, name: str, granularity: int) -> dict[str, Any]:
        settings, kernel = self.settings, KERNELS[name]
        bitmaps = [self._bitmap(seed, granularity) for seed in range(SELECTIONS)]
        if name not in self.programs:
            self.programs[name] = _programs(kernel, self.calls, self.blocks)
        prepare, whole, alone = self.programs[name]
        blocks_read = sum(int(np.bitwise_count(b[:, ::GROUP]).sum()) for b in bitmaps)
        bytes_read = blocks_read * self.block_bytes // SELECTIONS
        bitmaps = jax.device_put(bitmaps)
        prepared = jax.block_until_ready([prepare(bitmap) for bitmap in bitmaps])
        calls: dict[str, list[float]] = {"whole": [], "alone": []}
        ceilings = []
        for repetition in range(settings.repetitions + 1):
            top = self.ceiling_gb_s()
            seconds = {
                "whole": _seconds(lambda: whole(self.q, self.k, self.v, bitmaps)),
                "alone": _seconds(lambda: alone(self.q, self.k, self.v, prepared)),
            }
            if repetition:
                ceilings.append(top)
                for kind, values in calls.items():
                    values.append(seconds[kind] / self.calls)
        rate = {kind: [bytes_read / s / 1e9 for s in values] for kind, values in calls.items()}
        return {
            "place": self.place,
            "granularity": granularity,
            "kernel": name,
            "bytes_read": bytes_read,
            "ceiling_gb_s": summarise(ceilings),
            **{f"{kind}_us": summarise([1e6 * s for s in v]) for kind, v in calls.items()},
            **{f"{kind}_gb_s": summarise(v) for kind, v in rate.items()},
            **{
                f"{kind}_of_ceiling": summarise(v)["median"] / summarise(ceilings)["median"]
                for kind, v in rate.items()
            },
        }

    def _bitmap(self, seed: int, granularity: int) -> np.ndarray:
        """A random selection of whole units for every KV head, the same for its query heads."""
        rng = np.random.default_rng(seed)
        ratio = granularity // BLOCK_TOKENS
        units = self.blocks // ratio
        count = max(1, self.settings.read_bytes // (KV_HEADS * self.block_bytes * ratio))
        bits = np.zeros((KV_HEADS, units), np.uint8)
        for head in range(KV_HEADS):
            bits[head, rng.choice(units, count, replace=False)] = 1
        words = np.packbits(np.repeat(bits, ratio, axis=1), axis=1, bitorder="little")
        return np.repeat(words.view(np.uint32), GROUP, axis=0)[None]


@jax.jit
def _copy(x: jax.Array) -> jax.Array:
    return jnp.copy(jax.device_put(x, jax.memory.Space.Device))


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def _random_array(shape: tuple[int, ...], seed: int, place: str) -> jax.Array:
    space = jax.memory.Space.Device if place == "device" else jax.memory.Space.Host

    def fill() -> jax.Array:
        values = jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
        return jax.device_put(values, space)

    return jax.jit(fill, out_shardings=memory_sharding(place))()


def _programs(kernel: Kernel, calls: int, num_blocks: int) -> tuple[Any, Any, Any]:
    """Preparation of many selections, and loops of calls with it and without it.

    A loop goes through all selections in turn, as a program goes through layers: neither a slice
    of its inputs nor a start of a small program comes between the calls.
    """

    def prepare(bitmap: jax.Array) -> Any:
        return kernel.prepare(bitmap, KV_HEADS, num_blocks)

    def looped(attend: Callable[..., jax.Array]) -> Any:
        # Lowered once, however often the loop calls it.
        attend = jax.jit(attend)

        def program(q: jax.Array, k: jax.Array, v: jax.Array, inputs: Any) -> jax.Array:
            # As the decode step hands them over: Mosaic takes no operand that says it is pinned.
            k, v = (host_ops.retag(x, host_ops.DEVICE) for x in (k, v))

            def call_all(_: jax.Array, q: jax.Array) -> jax.Array:
                for selection in inputs:
                    # Nothing of a call may be done for all rounds at once, or before its turn.
                    q, chosen = jax.lax.optimization_barrier((q, selection))
                    # Each call needs the one before, but the queries hardly change.
                    q = q + 1e-30 * attend(q, k, v, chosen)
                return q

            return jax.lax.fori_loop(0, calls // SELECTIONS, call_all, q)

        return jax.jit(program)

    def whole(q: jax.Array, k: jax.Array, v: jax.Array, bitmap: jax.Array) -> jax.Array:
        return kernel.attend(q, k, v, prepare(bitmap), scale=HEAD_DIM**-0.5)

    alone = functools.partial(kernel.attend, scale=HEAD_DIM**-0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return jax.jit(prepare), looped(whole), looped(alone)


def render(report: dict[str, Any]) -> str:
    """The report as a table for a terminal."""
    lines = [
        "GB/s of useful bytes, medians; in brackets the share of the ceiling",
        "place       unit kernel             ceiling  with preparation              kernel alone",
    ]
    for r in report["rows"]:
        figures = "  ".join(
            f"{r[f'{kind}_us']['median']:8.1f} us {r[f'{kind}_gb_s']['median']:7.1f} "
            f"({r[f'{kind}_of_ceiling']:.2f})"
            for kind in ("whole", "alone")
        )
        lines.append(
            f"{r['place']:11s} {r['granularity']:4d} {r['kernel']:18s} "
            f"{r['ceiling_gb_s']['median']:7.1f}  {figures}"
        )
    return "\n".join(lines)
