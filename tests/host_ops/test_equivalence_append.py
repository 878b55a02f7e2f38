"""append and the flush of collect: every implementation writes what the NumPy reference writes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from host_ops import STATUS_INVALID, STATUS_OK, Flush, numpy_reference
from tests.host_ops import cases
from tests.host_ops.cases import Shape, check, check_cache, random_case

SHAPE = Shape()
FIRST_AND_COUNT = [
    ((0, 0), (7, 1)),
    ((0, 8), (0, 7)),
    ((5, 129), (3, 7)),
    ((8, 7), (1, 2)),
    ((62, 63), (4, 1)),
    # Nothing is written, so it does not matter where.
    ((-9, 999), (0, 0)),
]


def with_flush(case: cases.Case, first, count, seed: int = 5, shape: Shape = SHAPE) -> cases.Case:
    rng = np.random.default_rng(seed)
    case.flush = cases.random_flush(shape, rng, first, count)
    # Most channels keep their scale; some shift by more than an int8 has bits.
    shift = rng.choice([0, 0, 0, 1, 2, 7, 8, 40], size=case.flush.shift.shape)
    return case.with_flush(shift=shift)


def append(implementation: str, case: cases.Case):
    cache = [cases.to_host(x) for x in (case.k, case.v, case.summaries)]
    return jax.tree.map(np.asarray, cases.jitted_append(implementation)(*cache, case.flush))


@pytest.mark.parametrize(("first", "count"), FIRST_AND_COUNT)
def test_append(implementation, first, count):
    case = with_flush(random_case(SHAPE), first, count)
    *got, status = append(implementation, case)
    want = [x.copy() for x in (case.k, case.v, case.summaries)]
    assert status == numpy_reference.append(*want, case.flush) == [STATUS_OK]
    check_cache(got, want, case.flush)


def test_several_threads_requantise_large_summaries(implementation):
    # Beyond a megabyte of summaries the native operation hands tasks to its threads.
    shape = Shape(num_blocks=2048, head_dim=64)
    case = with_flush(random_case(shape), (2040, 1999), (1, 2), shape=shape)
    *got, status = append(implementation, case)
    want = [x.copy() for x in (case.k, case.v, case.summaries)]
    assert status == numpy_reference.append(*want, case.flush) == [STATUS_OK]
    check_cache(got, want, case.flush)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_append_moves_bits_not_numbers(implementation, dtype):
    shape = Shape(dtype=dtype)
    case = random_case(shape)
    case.flush = cases.random_flush(shape, np.random.default_rng(2), (3, 40), (7, 5))
    for name in "kv":
        blocks = getattr(case.flush, name)
        bits = blocks.view(np.uint32 if dtype == "float32" else np.uint16)
        # Signalling NaN with a payload, subnormal, negative zero.
        bits[0, 1, 2, 3, :3] = {
            "bfloat16": (0x7F81, 1, 0x8000),
            "float16": (0x7C01, 1, 0x8000),
            "float32": (0x7F800123, 1, 0x80000000),
        }[dtype]
    *got, _ = append(implementation, case)
    want = [x.copy() for x in (case.k, case.v, case.summaries)]
    numpy_reference.append(*want, case.flush)
    check_cache(got, want, case.flush)


def test_append_without_host_summaries(implementation):
    case = with_flush(random_case(SHAPE), (3, 40), (7, 5))
    case.summaries = None
    *got, status = append(implementation, case)
    want = [case.k.copy(), case.v.copy()]
    numpy_reference.append(*want, None, case.flush)
    check_cache(got, [*want, None], case.flush)
    assert status == [STATUS_OK]


@pytest.mark.parametrize(
    "fields",
    [
        {"num_blocks": (8, 0)},
        {"num_blocks": (-1, 0)},
        {"first_block": (-1, 0)},
        {"first_block": (0, 134)},
        {"first_block": (0, 2**31 - 1)},
        {"shift": np.full((2, 3, 40), -1)},
    ],
    ids=str,
)
def test_an_invalid_flush_is_refused_and_nothing_is_written(implementation, fields):
    case = with_flush(random_case(SHAPE), (1, 2), (3, 4)).with_flush(**fields)
    *got, status = append(implementation, case)
    assert status == [STATUS_INVALID]
    for a, b in zip(got, (case.k, case.v, case.summaries), strict=True):
        np.testing.assert_array_equal(a, b)
    case = case.with_work(boundary=np.full((2, 3), 136))
    want = check(implementation, case)
    assert want.status == [STATUS_INVALID]
    assert np.isneginf(want.lse).all()


def test_the_shift_of_a_sequence_that_writes_nothing_does_not_count(implementation):
    case = with_flush(random_case(SHAPE), (1, 2), (3, 0))
    shift = np.array(case.flush.shift)
    shift[1] = -1
    assert check(implementation, case.with_flush(shift=shift)).status == [STATUS_OK]


@pytest.mark.parametrize(("first", "count"), FIRST_AND_COUNT)
def test_collect_flushes(implementation, first, count):
    check(implementation, with_flush(random_case(SHAPE), first, count))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_collect_reads_everything_before_it_writes(implementation, dtype):
    shape = Shape(dtype=dtype)
    everything = np.full((2, 12), 10_000)
    case = random_case(shape).with_work(k_units=everything, boundary=np.full((2, 3), 136))
    case.flush = cases.random_flush(shape, np.random.default_rng(2), (3, 20), (7, 7))
    want = check(implementation, case)
    untouched = cases.reference(case.with_flush(num_blocks=(0, 0)))
    np.testing.assert_array_equal(want.out, untouched.out)


def fresh_summaries(keys: np.ndarray, exponents: np.ndarray, num_blocks: int) -> np.ndarray:
    """Summaries int8 `[K, U, 2, H]` of keys `[K, n, C, H]`, straight from the definition."""
    kv_heads, written, _, head_dim = keys.shape
    scaled = keys.astype(np.float64) / np.exp2(exponents)[:, None, None, :]
    summaries = np.zeros((kv_heads, num_blocks * 15 // 8, 2, head_dim), np.int8)
    first = 0
    for blocks_per_unit in (1, 2, 4, 8):
        for unit in range(-(-written // blocks_per_unit)):
            of_unit = scaled[:, unit * blocks_per_unit : (unit + 1) * blocks_per_unit]
            summaries[:, first + unit, 0] = np.floor(of_unit.min(axis=(1, 2)))
            summaries[:, first + unit, 1] = np.ceil(of_unit.max(axis=(1, 2)))
        first += num_blocks // blocks_per_unit
    return summaries


def exponents_of(keys: np.ndarray) -> np.ndarray:
    """Smallest exponents int32 `[K, H]` under which keys `[K, n, C, H]` fit into int8."""
    largest = np.abs(keys).max(axis=(1, 2), initial=0.0)
    exponents = np.full(largest.shape, -60)
    while (too_small := largest > 127 * np.exp2(exponents)).any():
        exponents += too_small
    return exponents


@pytest.mark.parametrize("chunks", [[7, 1, 7, 7, 1, 1, 6, 7, 7, 5], [1] * 9])
def test_requantising_equals_quantising_afresh(implementation, chunks):
    """Keys that grow, written in chunks, leave the summaries that all of them at once would."""
    rng = np.random.default_rng(3)
    total = sum(chunks)
    growth = np.exp2(rng.integers(0, 3, size=(2, 3, total, 1, 40)).cumsum(axis=2) / 4)
    keys = (rng.normal(size=(2, 3, total, 16, 40)) * growth).astype(np.float32)
    case = random_case(SHAPE)
    cache = [cases.to_host(x) for x in (case.k, case.v, case.summaries)]
    start, before = 0, np.full((2, 3, 40), -60)
    for count in chunks:
        written = keys[:, :, : start + count]
        after = np.stack([exponents_of(row) for row in written])
        blocks = np.zeros((2, 3, 7, 16, 40), np.float32)
        blocks[:, :, :count] = written[:, :, start:]
        scaled = blocks / np.exp2(after)[:, :, None, None]
        low, high = np.floor(scaled.min(axis=3)), np.ceil(scaled.max(axis=3))
        flush = Flush(
            k=blocks,
            v=blocks,
            summaries=np.stack([low, high], axis=3).astype(np.int8),
            shift=(after - before).astype(np.int32),
            first_block=np.full(2, start, np.int32),
            num_blocks=np.full(2, count, np.int32),
        )
        *cache, status = cases.jitted_append(implementation)(*cache, flush)
        assert jnp.all(status == STATUS_OK)
        start, before = start + count, after
    assert (after > after.min()).any()
    want = np.stack([fresh_summaries(keys[b], after[b], 136) for b in range(2)])
    got = np.asarray(cache[2])
    for granularity in (16, 32, 64, 128):
        first = numpy_reference.level_offset(granularity, 136)
        rows = slice(first, first + numpy_reference.num_units(granularity, total))
        np.testing.assert_array_equal(got[:, :, rows], want[:, :, rows], err_msg=f"{granularity}")
