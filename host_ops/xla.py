"""The XLA tier: the host operations as ordinary XLA programs of the CPU backend.

It needs nothing but JAX, and nothing runs beside the device: `submit` only hands out a tick, and
`collect` does all the work. Nothing of the size of a cache is copied when the cache is donated.
The order of every reduction is fixed, so equal inputs give equal bits.

It has no clock, so `times` are NaN, and it cannot look at a cancel word.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from host_ops import memory, ordering
from host_ops.types import STATUS_INVALID, TIMES, Collected, Flush, Tick, Work
from host_ops.xla_append import invalid_flush, write_blocks, write_summaries
from host_ops.xla_attend import attend
from host_ops.xla_select import pack, score_units, select_blocks, units_of, unpack

# A slot that no native submit hands out: `collect` refuses the ticks of other implementations.
_TICK_SLOT = -1


def unavailable_reason() -> str | None:
    """Returns why this tier cannot be used here, or None if it can."""
    backend = jax.default_backend()
    if backend == "cpu":
        return None
    return f"the default backend is {backend!r}, and XLA computes on host memory only on 'cpu'"


def append(
    k: jax.Array, v: jax.Array, summaries: jax.Array | None, flush: Flush
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
    """See `host_ops.api.append`."""
    status = invalid_flush(flush, k.shape[2])
    cache = _write(*_to_device(k, v, summaries), flush, status == 0)
    return *_to_host(*cache), status[None]


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
    batch, num_heads, _ = work.q.shape
    num_blocks = k.shape[2]
    k, v, summaries = _to_device(k, v, summaries)
    work = work._replace(host_blocks=ordering.after(work.host_blocks, after))
    status = _invalid_work(work, num_blocks) | invalid_flush(flush, num_blocks)
    status |= jnp.where((tick.slot == _TICK_SLOT).all(), 0, STATUS_INVALID).astype(jnp.int32)
    valid = status == 0
    # Work that is refused becomes work for no sequence, of a size that no index can exceed.
    work = work._replace(
        host_blocks=jnp.where(valid, work.host_blocks, 0),
        granularity=jnp.where(valid & _is_task(work), work.granularity, 16),
    )
    is_task = _is_task(work)

    chosen, units_scanned, summaries = _select(work, summaries, is_task, num_blocks)
    mine = chosen & (jnp.arange(num_blocks) < work.boundary[:, :, None, None])
    out, lse, k, v = attend(work.q, k, v, mine, scale)
    k, v, summaries = _to_host(*_write(k, v, summaries, flush, valid))
    return Collected(
        k=k,
        v=v,
        summaries=summaries,
        out=out,
        lse=lse,
        status=status[None],
        times=jnp.full((len(TIMES),), jnp.nan, jnp.float32),
        blocks_read=mine.any(axis=2).sum(axis=-1, dtype=jnp.int32),
        units_scanned=units_scanned,
        selection=pack(chosen).reshape(batch, num_heads, -1) if return_selection else None,
    )


def _select(
    work: Work, summaries: jax.Array | None, is_task: jax.Array, num_blocks: int
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Selected blocks bool `[B, K, G, P]`, units scored int32 `[B, K]`, and the summaries."""
    batch, kv_heads = is_task.shape
    if work.bitmap is not None:
        chosen = unpack(work.bitmap, num_blocks).reshape(batch, kv_heads, -1, num_blocks)
        chosen &= jnp.arange(num_blocks) < work.host_blocks[:, None, None, None]
        none_scored = jnp.zeros((batch, kv_heads), jnp.int32)
        return chosen & is_task[:, :, None, None], none_scored, summaries
    if summaries is None:
        raise ValueError(
            "expected summaries or work.bitmap, got neither, so there is nothing to select from"
        )
    units = jnp.where(is_task, units_of(work.granularity, work.host_blocks), 0)
    wanted = work.k_units.reshape(batch, kv_heads, -1)
    # Nothing is ranked where every head wants nothing, or every head wants all.
    ranked = (wanted.max(axis=-1) > 0) & (wanted.min(axis=-1) < units)
    scored = jnp.where(ranked, units, 0)
    scores, summaries = score_units(work, summaries, scored)
    return select_blocks(work, scores, units, num_blocks), scored, summaries


def _write(
    k: jax.Array, v: jax.Array, summaries: jax.Array | None, flush: Flush, enabled: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    k, v = write_blocks(k, v, flush, enabled)
    return k, v, None if summaries is None else write_summaries(summaries, flush, enabled)


def _is_task(work: Work) -> jax.Array:
    return (work.boundary > 0) & (work.host_blocks[:, None] > 0)


def _invalid_work(work: Work, num_blocks: int) -> jax.Array:
    g = work.granularity
    known = (g == 16) | (g == 32) | (g == 64) | (g == 128)
    # A given bitmap is in blocks, and a row without work has no units.
    good = (known | ~_is_task(work)).all() | (work.bitmap is not None)
    good &= ((work.host_blocks >= 0) & (work.host_blocks <= num_blocks)).all()
    return jnp.where(good, 0, STATUS_INVALID).astype(jnp.int32)


def _to_device(
    k: jax.Array, v: jax.Array, summaries: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    k, v = memory.retag(k, memory.DEVICE), memory.retag(v, memory.DEVICE)
    return k, v, None if summaries is None else memory.retag(summaries, memory.DEVICE)


def _to_host(
    k: jax.Array, v: jax.Array, summaries: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    k, v = memory.retag(k, memory.HOST), memory.retag(v, memory.HOST)
    return k, v, None if summaries is None else memory.retag(summaries, memory.HOST)
