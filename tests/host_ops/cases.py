"""Inputs of the host operations, and the comparison of an implementation with the reference."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import host_ops
from host_ops import TIMES, Collected, Flush, Work, numpy_reference

BLOCK_TOKENS = 16
# Against float64 on the same stored values; bfloat16 storage is computed in float32 and costs
# nothing more. Inputs have unit variance, scores too.
TOLERANCE = 4e-6


@dataclasses.dataclass(frozen=True)
class Shape:
    """No two axes have the same size, so that no swapped axis can pass."""

    dtype: str = "float32"
    head_dim: int = 40
    group: int = 4
    batch: int = 2
    kv_heads: int = 3
    num_blocks: int = 136
    flush_blocks: int = 7

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def units(self) -> int:
        return self.num_blocks * 15 // 8

    @property
    def words(self) -> int:
        return -(-self.num_blocks // 32)


@dataclasses.dataclass
class Case:
    """NumPy arrays of one collect."""

    work: Work
    k: np.ndarray
    v: np.ndarray
    summaries: np.ndarray | None
    flush: Flush
    scale: float

    def with_work(self, **fields: Any) -> Case:
        dtypes = {"q": np.float32, "q8": np.int8, "bitmap": np.uint32}
        fields = {
            name: np.asarray(value, dtypes.get(name, np.int32)) for name, value in fields.items()
        }
        return dataclasses.replace(self, work=self.work._replace(**fields))

    def with_flush(self, **fields: Any) -> Case:
        fields = {
            name: np.asarray(value, getattr(self.flush, name).dtype)
            for name, value in fields.items()
        }
        return dataclasses.replace(self, flush=self.flush._replace(**fields))


def summaries_of(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Random int8 `[..., 2, H]`, low below high."""
    return np.sort(rng.integers(-127, 128, size=shape), axis=-2).astype(np.int8)


def no_flush(shape: Shape) -> Flush:
    return random_flush(shape, np.random.default_rng(1), [0] * shape.batch, [0] * shape.batch)


def random_flush(shape: Shape, rng: np.random.Generator, first: Any, count: Any) -> Flush:
    blocks = (shape.batch, shape.kv_heads, shape.flush_blocks)
    return Flush(
        k=rng.normal(size=(*blocks, BLOCK_TOKENS, shape.head_dim)).astype(jnp.dtype(shape.dtype)),
        v=rng.normal(size=(*blocks, BLOCK_TOKENS, shape.head_dim)).astype(jnp.dtype(shape.dtype)),
        summaries=summaries_of(rng, *blocks, 2, shape.head_dim),
        shift=np.zeros((shape.batch, shape.kv_heads, shape.head_dim), np.int32),
        first_block=np.asarray(first, np.int32),
        num_blocks=np.asarray(count, np.int32),
    )


def random_case(shape: Shape = Shape(), seed: int = 0, bitmap: bool = False) -> Case:
    """A case with something of everything: ragged, mixed granularities, budgets and splits."""
    rng = np.random.default_rng(seed)
    per_group, per_head = (shape.batch, shape.kv_heads), (shape.batch, shape.heads)
    cache = (*per_group, shape.num_blocks, BLOCK_TOKENS, shape.head_dim)
    half = shape.num_blocks // 2
    host_blocks = rng.integers(half, max(half + 1, shape.num_blocks - 7), size=shape.batch)
    work = Work(
        q=rng.normal(size=(*per_head, shape.head_dim)).astype(np.float32),
        q8=rng.integers(-127, 128, size=(*per_head, shape.head_dim)).astype(np.int8),
        granularity=rng.permuted(np.resize([16, 32, 64, 128], per_group)).astype(np.int32),
        k_units=rng.integers(0, 12, size=per_head).astype(np.int32),
        shared=rng.integers(0, 2, size=per_group).astype(np.int32),
        host_blocks=host_blocks.astype(np.int32),
        boundary=rng.integers(-1, shape.num_blocks + 9, size=per_group).astype(np.int32),
        cancel=np.zeros(1, np.int32),
        bitmap=rng.integers(0, 2**32, size=(*per_head, shape.words), dtype=np.uint32)
        if bitmap
        else None,
    )
    return Case(
        work=work,
        k=rng.normal(size=cache).astype(jnp.dtype(shape.dtype)),
        v=rng.normal(size=cache).astype(jnp.dtype(shape.dtype)),
        summaries=summaries_of(rng, *per_group, shape.units, 2, shape.head_dim),
        flush=no_flush(shape),
        scale=shape.head_dim**-0.5,
    )


def to_host(x: np.ndarray | None) -> jax.Array | None:
    return None if x is None else jax.device_put(x, host_ops.HOST)


@functools.cache
def jitted_step(implementation: str) -> Any:
    """submit and collect as they stand in a decode step."""

    def step(work: Work, k: Any, v: Any, summaries: Any, flush: Flush, scale: float) -> Collected:
        tick = host_ops.submit(work, k, v, summaries, scale=scale, implementation=implementation)
        device_lse = jnp.where(tick.slot[0] >= 0, work.q[..., 0], -jnp.inf)
        return host_ops.collect(
            tick,
            work,
            k,
            v,
            summaries,
            flush,
            (device_lse,),
            scale=scale,
            return_selection=True,
            implementation=implementation,
        )

    return jax.jit(step, static_argnames="scale", donate_argnums=(1, 2, 3))


@functools.cache
def jitted_append(implementation: str) -> Any:
    append = functools.partial(host_ops.append, implementation=implementation)
    return jax.jit(append, donate_argnums=(0, 1, 2))


def run(implementation: str, case: Case) -> Collected:
    """Runs submit and collect; returns NumPy arrays."""
    result = jitted_step(implementation)(
        case.work,
        to_host(case.k),
        to_host(case.v),
        to_host(case.summaries),
        case.flush,
        scale=case.scale,
    )
    return jax.tree.map(np.asarray, result)


def reference(case: Case) -> Collected:
    k, v = case.k.copy(), case.v.copy()
    summaries = None if case.summaries is None else case.summaries.copy()
    share = numpy_reference.collect(case.work, k, v, summaries, case.flush, case.scale)
    fields = {name: value for name, value in share._asdict().items() if name != "stages_s"}
    return Collected(k=k, v=v, summaries=summaries, times=np.zeros(len(TIMES)), **fields)


def check(implementation: str, case: Case, tolerance: float = TOLERANCE) -> Collected:
    """Compares one implementation with the reference, row by row; returns the reference."""
    got, want = run(implementation, case), reference(case)
    assert got.out.dtype == got.lse.dtype == got.times.dtype == np.float32
    np.testing.assert_array_equal(got.status, want.status)
    np.testing.assert_array_equal(got.selection, want.selection)
    np.testing.assert_array_equal(got.blocks_read, want.blocks_read)
    np.testing.assert_array_equal(got.units_scanned, want.units_scanned)
    check_cache((got.k, got.v, got.summaries), (want.k, want.v, want.summaries), case.flush)
    for b, n in np.ndindex(want.lse.shape):
        row = f"sequence {b}, head {n}"
        np.testing.assert_allclose(got.lse[b, n], want.lse[b, n], tolerance, tolerance, err_msg=row)
        np.testing.assert_allclose(got.out[b, n], want.out[b, n], tolerance, tolerance, err_msg=row)
    return want


def check_cache(got: Any, want: Any, flush: Flush) -> None:
    """Compares caches bit by bit; of the summaries only rows of units that have been written."""
    for name, a, b in zip("kv", got[:2], want[:2], strict=True):
        bits = np.uint16 if a.dtype.itemsize == 2 else np.uint32
        np.testing.assert_array_equal(a.view(bits), b.view(bits), err_msg=name)
    if want[2] is None:
        assert got[2] is None
        return
    num_blocks = want[0].shape[2]
    for b, written in enumerate(flush.first_block + flush.num_blocks):
        for granularity in (16, 32, 64, 128):
            first = numpy_reference.level_offset(granularity, num_blocks)
            rows = slice(first, first + numpy_reference.num_units(granularity, written))
            message = f"summaries of sequence {b} at granularity {granularity}"
            np.testing.assert_array_equal(got[2][b, :, rows], want[2][b, :, rows], err_msg=message)
