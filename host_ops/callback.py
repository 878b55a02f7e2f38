"""The NumPy tier: the reference run by a zero-copy callback on the CPU backend.

`buffer_callback` hands NumPy views of XLA's own buffers, so the cache is changed in place and
never copied if the enclosing `jax.jit` donates it. It is slow, and it is as obviously right as
`host_ops.numpy_reference` is. `submit` only hands out a tick, and `collect` does all the work.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from host_ops import control, memory, numpy_reference
from host_ops.in_place import call_in_place
from host_ops.types import STATUS_CANCELLED, STATUS_INVALID, TIMES, Collected, Flush, Tick, Work

# A slot that no other submit hands out: `collect` refuses the ticks of other implementations.
_TICK_SLOT = -2


def unavailable_reason() -> str | None:
    """Returns why this tier cannot be used here, or None if it can."""
    backend = jax.default_backend()
    if backend == "cpu":
        return None
    return f"the default backend is {backend!r}, and NumPy can only reach the buffers of 'cpu'"


def append(
    k: jax.Array, v: jax.Array, summaries: jax.Array | None, flush: Flush
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
    """See `host_ops.api.append`."""

    def run(cache: Sequence[np.ndarray], results: Sequence[np.ndarray], operands: Any) -> None:
        (status,) = results
        fault = control.take_fault("append")
        status[...] = fault or numpy_reference.append(*_split(cache), operands)

    cache, (status,) = call_in_place(
        run, _to_device(k, v, summaries), (jax.ShapeDtypeStruct((1,), jnp.int32),), flush
    )
    return *_to_host(cache), status


def submit(
    work: Work, k: jax.Array, v: jax.Array, summaries: jax.Array | None, *, scale: float
) -> Tick:
    """See `host_ops.api.submit`; nothing starts before `collect`."""
    del work, k, v, summaries, scale
    return Tick(jnp.full((2,), _TICK_SLOT, jnp.int32))


def collect(
    tick: Tick,
    work: Work,
    k: jax.Array,
    v: jax.Array,
    summaries: jax.Array | None,
    flush: Flush,
    after: tuple[jax.Array, ...],
    *,
    scale: float,
    return_selection: bool = False,
) -> Collected:
    """See `host_ops.api.collect`."""
    batch, num_heads, head_dim = work.q.shape
    kv_heads, num_blocks = k.shape[1:3]
    words = -(-num_blocks // 32)
    result_types = (
        jax.ShapeDtypeStruct((batch, num_heads, head_dim), jnp.float32),
        jax.ShapeDtypeStruct((batch, num_heads), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
        jax.ShapeDtypeStruct((len(TIMES),), jnp.float32),
        jax.ShapeDtypeStruct((batch, kv_heads), jnp.int32),
        jax.ShapeDtypeStruct((batch, kv_heads), jnp.int32),
        jax.ShapeDtypeStruct((batch, num_heads, words), jnp.uint32),
    )

    def run(cache: Sequence[np.ndarray], results: Sequence[np.ndarray], operands: Any) -> None:
        start_s = time.perf_counter()
        slot, work, flush, _ = operands
        refused = _refusal(slot, work)
        if refused:
            share = numpy_reference.no_work(work, num_blocks, kv_heads, refused)
        else:
            share = numpy_reference.collect(work, *_split(cache), flush, scale)
        out, lse, status, times, blocks_read, units_scanned, selection = results
        out[...], lse[...], status[...] = share.out, share.lse, share.status
        blocks_read[...], units_scanned[...] = share.blocks_read, share.units_scanned
        selection[...] = share.selection
        elapsed_s = time.perf_counter() - start_s
        # One stage of all tasks after the other.
        stages_s = share.stages_s
        times[...] = (elapsed_s, elapsed_s, elapsed_s, *stages_s, 0.0, elapsed_s, stages_s[0])

    cache, results = call_in_place(
        run, _to_device(k, v, summaries), result_types, (tick.slot, work, flush, after)
    )
    out, lse, status, times, blocks_read, units_scanned, selection = results
    return Collected(
        *_to_host(cache),
        out,
        lse,
        status,
        times,
        blocks_read,
        units_scanned,
        selection if return_selection else None,
    )


def _refusal(slot: np.ndarray, work: Work) -> int:
    if (slot != _TICK_SLOT).any():
        return STATUS_INVALID
    if control.is_cancelled(int(work.cancel[0])):
        return STATUS_CANCELLED
    return control.take_fault("collect")


def _to_device(k: jax.Array, v: jax.Array, summaries: jax.Array | None) -> list[jax.Array]:
    cache = [k, v] if summaries is None else [k, v, summaries]
    return [memory.retag(x, memory.DEVICE) for x in cache]


def _to_host(cache: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    return _split([memory.retag(x, memory.HOST) for x in cache])


def _split(cache: Sequence[Any]) -> tuple[Any, Any, Any]:
    return cache[0], cache[1], cache[2] if len(cache) > 2 else None
