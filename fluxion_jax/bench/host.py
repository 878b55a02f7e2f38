"""`fluxion bench host`: the host's kernels against what its memory can deliver."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import host_ops
from fluxion_jax.bench.cells import cell
from fluxion_jax.bench.comparators import GATHER, attention_times_s, scoring_times_s
from fluxion_jax.bench.host_report import requirements
from fluxion_jax.bench.stamp import cache_bytes, stamp
from fluxion_jax.bench.statistics import summarise
from fluxion_jax.cache.host_kv import memory_sharding
from fluxion_jax.env import _memory
from fluxion_jax.errors import FluxionError
from host_ops import TIMES, Flush, Work, ceiling, native
from host_ops.numpy_append import level_offset

KV_HEADS = 8
LAYERS = 4  # Of the program that measures what a layer costs besides its three stages.
REST_FRACTION = 0.01  # Of the cache; what it reads does not count there.


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      shapes: (head size, query heads of a group).
      granularities: tokens of a unit.
      repetitions: of each figure.
      cache_bytes: K and V of the cache; None for three times the last-level cache, at least 1 GiB
        and at most a sixth of the free memory.
      read_fraction: share of the cache that attention reads.
      compared_shapes: so many shapes, from the first on, are compared with other libraries.
    """

    shapes: tuple[tuple[int, int], ...] = ((128, 4), (128, 7), (64, 3), (256, 4))
    granularities: tuple[int, ...] = (16, 32, 64, 128)
    repetitions: int = 9
    cache_bytes: int | None = None
    read_fraction: float = 0.1
    compared_shapes: int = 4


QUICK = Settings(shapes=((128, 4),), repetitions=5)


def run(
    settings: Settings = Settings(),
    folder: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
    *,
    budget_s: float | None = None,
) -> dict[str, Any]:
    """Measures ceiling, attention, scoring and selection with all threads and with one.

    Args:
      settings: what is measured.
      folder: where finished cells are kept and looked for; None keeps nothing.
      say: told in one line what is measured next.
      budget_s: no further cell is begun after so many seconds; what is missing is named in the
        report and measured by the next run with the same folder.

    Raises:
      FluxionError: the native library cannot be used.
    """
    if reason := native.unavailable_reason():
        raise FluxionError(f"expected the native host library, got none: {reason}")
    # This is the host's side of a step whose other side is a GPU's.
    with native.awake():
        return _run(settings, _Cells(folder, say, budget_s))


def _run(settings: Settings, cells: _Cells) -> dict[str, Any]:
    wanted = settings.cache_bytes or _default_bytes()
    threads = native.info()["threads"]
    rows: list[dict[str, Any]] = []
    # Before the rest, because it is short.
    noop = cells.get(f"host-noop-{threads}", "a call without work", lambda: noop_call_us(9))
    for index, (head_dim, group) in enumerate(settings.shapes):
        compare = index < settings.compared_shapes
        rows += _shape_rows(head_dim, group, wanted, threads, compare, settings, cells)
    report = {
        "benchmark": "host",
        "threads": threads,
        "spin_us": native.info()["spin_us"],
        "variant": native.info()["variant"],
        "stamp": stamp(),
        "settings": {**dataclasses.asdict(settings), "cache_bytes": wanted, "kv_heads": KV_HEADS},
        "noop_call_us": noop,
        "rows": rows,
        "left_out": cells.left_out,
    }
    return {**report, "requirements": requirements(report)}


class _Cells:
    """Cells that are kept in a folder, as long as there is time."""

    def __init__(
        self, folder: Path | None, say: Callable[[str], None], budget_s: float | None
    ) -> None:
        self.folder, self.say = folder, say
        self.end = None if budget_s is None else time.monotonic() + budget_s
        self.left_out: list[str] = []

    def get(
        self, name: str, words: str, measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any] | None:
        """A cell's figures, or None if it was not measured before and the time is over."""

        def measured() -> dict[str, Any]:
            if self.end is not None and time.monotonic() > self.end:
                raise _OutOfTimeError
            self.say(words)
            return measure()

        try:
            return cell(self.folder, name, measured)
        except _OutOfTimeError:
            self.left_out.append(words)
            return None


class _OutOfTimeError(Exception):
    pass


def _shape_rows(
    head_dim: int,
    group: int,
    wanted: int,
    threads: int,
    compare: bool,
    settings: Settings,
    cells: _Cells,
) -> list[dict[str, Any]]:
    # Built by the first cell that has to be measured, and gone with the last.
    benches: list[_Bench] = []

    def measure(granularity: int, count: int) -> dict[str, Any]:
        if not benches:
            benches.append(_Bench(head_dim, group, wanted))
        native.set_threads(count)
        try:
            return benches[0].measure(granularity, count, settings, compare and count == threads)
        finally:
            native.set_threads(threads)

    rows = [
        cells.get(
            f"host-from-start-{wanted}-{head_dim}-{group}-{granularity}-{count}-{native.info()['variant']}",
            f"head size {head_dim}, group {group}, unit {granularity}, {count} threads",
            partial(measure, granularity, count),
        )
        for count in sorted({1, threads}, reverse=True)
        for granularity in settings.granularities
    ]
    return [row for row in rows if row is not None]


def _default_bytes() -> int:
    memory = _memory()
    free = min(int(str(memory["available_bytes"])), int(str(memory["limit_bytes"] or 2**60)))
    return min(max(3 * max(cache_bytes().values(), default=0), 2**30), free // 6)


class _Bench:
    """A cache of one shape, and the compiled step that reads it."""

    def __init__(self, head_dim: int, group: int, wanted: int) -> None:
        self.head_dim, self.group = head_dim, group
        self.blocks = max(64, wanted // (KV_HEADS * 64 * head_dim) // 64 * 64)
        self.block_bytes = 64 * head_dim
        cache = (1, KV_HEADS, self.blocks, 16, head_dim)
        rows = (1, KV_HEADS, self.blocks * 15 // 8, 2, head_dim)
        self.rng = np.random.default_rng(0)
        # Not a repeated pattern: equal scores would make ranking another task than it is.
        ends = self.rng.integers(-100, 100, (2, *rows[:3], head_dim), np.int8)
        summaries = np.stack([ends.min(axis=0), ends.max(axis=0)], axis=3)
        pattern = (*cache[:2], 8, *cache[3:])
        k, v = (
            _tiled(jax.random.normal(jax.random.key(seed), pattern), cache, "bfloat16")
            for seed in (1, 2)
        )
        self.cache = (k, v, _tiled(summaries, rows, "int8"))
        self.program = _program(head_dim**-0.5)

    def work(self, granularity: int, k_units: int, bitmap: Any) -> Work:
        heads = (1, KV_HEADS * self.group)
        q = self.rng.normal(size=(*heads, self.head_dim)).astype(np.float32)
        per_group = np.ones((1, KV_HEADS), np.int32)
        return Work(
            q=jnp.asarray(q),
            q8=jnp.asarray(np.clip(q * 40, -127, 127).astype(np.int8)),
            granularity=jnp.asarray(per_group * granularity),
            k_units=jnp.full(heads, k_units, jnp.int32),
            shared=jnp.asarray(per_group * 0),
            host_blocks=jnp.asarray([self.blocks], jnp.int32),
            boundary=jnp.asarray(per_group * self.blocks),
            cancel=jnp.zeros(1, jnp.int32),
            bitmap=bitmap,
        )

    def step(self, *layers: Work) -> tuple[list[dict[str, float]], int]:
        """Seconds by name of each layer of a step, and blocks read by the last."""
        flush = _nothing(self.head_dim)
        self.cache, status, times, read = jax.block_until_ready(
            self.program(self.cache, layers, flush)
        )
        if int(status[0]) != host_ops.STATUS_OK:
            raise FluxionError(f"expected status 0, got {int(status[0])}")
        seconds = np.asarray(times, float).tolist()
        return [dict(zip(TIMES, layer, strict=True)) for layer in seconds], int(read.sum())

    def rest_us(self, granularity: int, threads: int, repetitions: int) -> dict[str, Any]:
        """What a layer costs besides its stages, and what threads are idle within them."""
        k_units = max(1, int(REST_FRACTION * self.blocks * 16 // granularity))
        within, alone, own, idle = [], [], [], []
        for repetition in range(repetitions + 1):
            layers, _ = self.step(*[self.work(granularity, k_units, None)] * LAYERS)
            if repetition == 0:
                continue
            rests = [_rest_us(layer, threads) for layer in layers]
            # The first comes after what Python and JAX do between two steps.
            within.append(float(np.mean(rests[1:])))
            alone.append(rests[0])
            own.append(1e6 * float(np.mean([layer["own"] for layer in layers[1:]])))
            idles = [1e6 * _idle_s(layer, threads) / threads for layer in layers]
            idle.append(float(np.mean(idles[1:])))
        return {
            "rest_us": summarise(within),
            "rest_first_us": summarise(alone),
            "own_us": summarise(own),
            "imbalance_us": summarise(idle),
        }

    def measure(
        self, granularity: int, threads: int, settings: Settings, compare: bool
    ) -> dict[str, Any]:
        keys = np.asarray(self.cache[0])
        self.step(self.work(granularity, 1, None))
        ceilings, attention, scoring, busy_scoring, share = [], [], [], [], []
        scored_bytes = KV_HEADS * (self.blocks * 16 // granularity) * 2 * self.head_dim
        fraction = settings.read_fraction
        k_units = max(1, int(fraction * self.blocks * 16 // granularity))
        for repetition in range(settings.repetitions + 1):
            # Reading all keys also drives out of the caches what the next step reads.
            read_s, _ = ceiling.read_all(keys)
            ids, bitmap = self.random_selection(granularity, fraction)
            [attended], blocks = self.step(self.work(granularity, 0, bitmap))
            ceiling.read_all(keys)
            [selected], _ = self.step(self.work(granularity, k_units, None))
            scored = selected if threads == 1 else self.scored(granularity, keys)
            if repetition == 0:
                continue
            ceilings.append(keys.nbytes / read_s / 1e9)
            attention.append(blocks * self.block_bytes / attended["span"] / 1e9)
            scored_s = scored["scored"] if threads == 1 else scored["scoring"]
            scoring.append(scored_bytes / scored_s / 1e9)
            busy_scoring.append(scored_bytes / (scored["scored"] / threads) / 1e9)
            share.append(selected["selected"] / selected["scored"])
        del keys
        top = summarise(ceilings)["median"]
        row: dict[str, Any] = {
            "head_dim": self.head_dim,
            "group": self.group,
            "granularity": granularity,
            "threads": threads,
            "ceiling_gb_s": summarise(ceilings),
            "attention_gb_s": summarise(attention),
            "attention_of_ceiling": summarise(attention)["median"] / top,
            "scoring_gb_s": summarise(scoring),
            "scoring_of_ceiling": summarise(scoring)["median"] / top,
            "scoring_without_idle_gb_s": summarise(busy_scoring),
            "selection_of_scoring": summarise(share),
            **self.rest_us(granularity, threads, settings.repetitions),
        }
        if compare:
            row |= self.compare(granularity, ids, scored_bytes, row)
        return row

    def scored(self, granularity: int, keys: Any) -> dict[str, float]:
        """Seconds by name of a layer that scores, and ranks and reads next to nothing."""
        # Of a group one head wants one unit, and of its blocks the host's share is the first.
        one = np.zeros((1, KV_HEADS * self.group), np.int32)
        one[:, :: self.group] = 1
        little = {
            "k_units": jnp.asarray(one),
            "boundary": jnp.ones((1, KV_HEADS), jnp.int32),
        }
        ceiling.read_all(keys)
        # Other rows are scored before, so that the threads are awake, as they are within a model.
        before = self.work(16 if granularity > 16 else 32, 1, None)._replace(**little)
        return self.step(before, self.work(granularity, 1, None)._replace(**little))[0][1]

    def compare(
        self, granularity: int, ids: Any, scored_bytes: int, row: dict[str, Any]
    ) -> dict[str, Any]:
        """Figures of the comparators, and of ours over the fastest that does the same work."""
        keys = np.asarray(self.cache[0])

        def cool() -> None:
            ceiling.read_all(keys)

        useful = ids.size * self.block_bytes
        q = self.rng.normal(size=(KV_HEADS, self.group, self.head_dim)).astype(np.float32)
        k, v = self.cache[0][0], self.cache[1][0]
        attention = attention_times_s(q, k, v, ids, self.head_dim**-0.5, 3, cool)
        attended = {n: useful / s["median"] / 1e9 for n, s in attention.items()}
        fastest = max(speed for name, speed in attended.items() if GATHER in name)
        first = level_offset(granularity, self.blocks)
        rows = self.cache[2][0][:, first : first + self.blocks * 16 // granularity]
        q8 = np.clip(q * 40, -127, 127).astype(np.int8)
        scoring = scoring_times_s(q8, rows, 3, cool)
        scored = {n: scored_bytes / s["median"] / 1e9 for n, s in scoring.items()}
        return {
            "attention_comparators_gb_s": attended,
            "attention_over_fastest": row["attention_gb_s"]["median"] / fastest,
            "scoring_comparators_gb_s": scored,
            "scoring_over_fastest": row["scoring_gb_s"]["median"] / max(scored.values()),
        }

    def random_selection(self, granularity: int, fraction: float) -> tuple[Any, jax.Array]:
        """Sorted random blocks `[K, M]` in whole units, and their bitmap for every head."""
        ratio = granularity // 16
        units = self.blocks // ratio
        count = max(1, int(units * fraction))
        picked = [np.sort(self.rng.choice(units, count, replace=False)) for _ in range(KV_HEADS)]
        ids = (np.stack(picked)[..., None] * ratio + np.arange(ratio)).reshape(KV_HEADS, -1)
        bits = np.zeros((KV_HEADS, self.blocks), np.uint8)
        np.put_along_axis(bits, ids, 1, axis=1)
        words = np.packbits(bits, axis=1, bitorder="little").view(np.uint32)
        return ids, jnp.asarray(np.repeat(words, self.group, axis=0)[None])


def _tiled(pattern: Any, shape: tuple[int, ...], dtype: str) -> Any:
    def fill(x: Any) -> Any:
        repeats = -(-shape[2] // x.shape[2])
        whole = jnp.tile(x.astype(dtype), (1, 1, repeats, 1, 1))[:, :, : shape[2]]
        return jax.device_put(whole, jax.memory.Space.Host)

    return jax.jit(fill, out_shardings=memory_sharding("pinned_host"))(pattern)


def _nothing(head_dim: int) -> Flush:
    blocks = jnp.zeros((1, KV_HEADS, 1, 16, head_dim), jnp.bfloat16)
    return Flush(
        blocks,
        blocks,
        jnp.zeros((1, KV_HEADS, 1, 2, head_dim), jnp.int8),
        jnp.zeros((1, KV_HEADS, head_dim), jnp.int32),
        jnp.zeros(1, jnp.int32),
        jnp.zeros(1, jnp.int32),
    )


def _rest_us(times: dict[str, float], threads: int) -> float:
    """Microseconds in which no thread was in a stage, and those of submit and collect."""
    # With workers the layer is under way before the caller waits for it.
    wall_s = times["waited"] if threads == 1 else times["span"]
    return 1e6 * (wall_s - times["covered"] + times["own"])


def _idle_s(times: dict[str, float], threads: int) -> float:
    """Seconds, summed over the threads that run tasks, idle while others were in a stage."""
    return threads * times["covered"] - times["busy"]


def _program(scale: float) -> Any:
    def step(cache: Any, layers: tuple[Work, ...], flush: Flush) -> Any:
        k, v, summaries = cache
        status, times, out = jnp.zeros(1, jnp.int32), [], jnp.float32(0)
        for layer in layers:
            # As in a model, a layer's query follows from what the one before has attended to.
            work = layer._replace(q=layer.q + out)
            tick = host_ops.submit(work, k, v, summaries, scale=scale, implementation="native")
            done = host_ops.collect(
                tick, work, k, v, summaries, flush, (), scale=scale, implementation="native"
            )
            k, v, summaries, out = done.k, done.v, done.summaries, done.out
            status |= done.status
            times.append(done.times)
        return (k, v, summaries), status, jnp.stack(times), done.blocks_read

    return jax.jit(step, donate_argnums=0)


def noop_call_us(repetitions: int) -> dict[str, float | int]:
    """Microseconds of one append without work among 32 chained, as `summarise` gives them.

    The difference between programs of 64 and of 32 calls, so that what JAX takes to call a program
    is left out.
    """
    flush = _nothing(16)
    empty = (
        jnp.zeros((1, KV_HEADS, 8, 16, 16), jnp.bfloat16),
        jnp.zeros((1, KV_HEADS, 8, 16, 16), jnp.bfloat16),
        jnp.zeros((1, KV_HEADS, 15, 2, 16), jnp.int8),
    )

    def chain(length: int) -> Callable[[], float]:
        def calls(cache: Any) -> Any:
            k, v, summaries = cache
            for _ in range(length):
                k, v, summaries, _ = host_ops.append(
                    k, v, summaries, flush, implementation="native"
                )
            return k, v, summaries

        program = jax.jit(calls, donate_argnums=0)
        caches = [jax.block_until_ready(program(jax.device_put(empty, host_ops.HOST)))]

        def seconds() -> float:
            start = time.perf_counter()
            caches[0] = jax.block_until_ready(program(caches[0]))
            return time.perf_counter() - start

        return seconds

    short, long = chain(32), chain(64)
    taken = []
    for _ in range(repetitions):
        # Whatever else the machine does makes a run slower, never faster.
        least = [min(run() for _ in range(30)) for run in (short, long)]
        taken.append(1e6 * (least[1] - least[0]) / 32)
    return summarise(taken)
