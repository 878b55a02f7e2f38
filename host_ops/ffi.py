"""The native implementation of append, submit and collect, as XLA FFI calls.

Everything here is traced: the work is done by csrc/ when the compiled program runs. On the CPU
backend submit is an asynchronous call: it hands the tasks to the library's own threads and is over
when they have run, and what depends on its tick comes then. So a program that fails holds its cache
for as long as threads read it. With one thread, and in programs of several devices, it is over at
once, and collect begins the tasks and does its part of them.

The cache arrays are aliased: a program that donates them gets the same buffers back. One that does
not makes XLA copy them whole, which is correct and slow. If the copy comes between submit and
collect (as in separate programs), collect notices and reports `STATUS_NOT_IN_PLACE`, because the
tasks may have read memory that had been given away.

For a GPU XLA takes every result of a call with an aliased host operand to be host memory too, has
the host compute with it, and looks through chains of such calls in exponential time. There append
and collect have no cache among their results. They change it between two calls of `fluxion_keep`,
which do nothing, alias one array each, and so order all that reads the cache before or after.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from host_ops import compat, native
from host_ops.memory import HOST, retag
from host_ops.types import TIMES, Collected, Flush, Tick, Work


def append(
    k: jax.Array,
    v: jax.Array,
    summaries: jax.Array | None,
    flush: Flush,
    first_row: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
    """Writes whole blocks into the host cache and waits for it; see `host_ops.api.append`.

    Args:
      k: host cache `[B, K, P, 16, H]`, bfloat16, float16 or float32.
      v: likewise.
      summaries: int8 `[B, K, U, 2, H]`, or None if they are kept on the device.
      flush: the blocks.
      first_row: int32 `[1]` or None, see `host_ops.api.append`.

    Returns:
      `(k, v, summaries, status int32 [1])`.
    """
    native.require()
    rows = [] if first_row is None else [first_row]
    if compat.traced_for_gpu():
        k, v, summaries = _keep((k, v, summaries), (flush.num_blocks,))
        optional = [x for x in (summaries,) if x is not None]
        call = jax.ffi.ffi_call(
            "fluxion_append", [jax.ShapeDtypeStruct((1,), jnp.int32)], has_side_effect=True
        )
        (status,) = call(
            *rows,
            k,
            v,
            *flush,
            *optional,
            has_summaries=summaries is not None,
            has_first_row=bool(rows),
        )
        return *_keep((k, v, summaries), (status,)), status
    operands = [*rows, k, v, *flush]
    results = [_like(k), _like(v), jax.ShapeDtypeStruct((1,), jnp.int32)]
    aliases = {len(rows): 0, len(rows) + 1: 1}
    if summaries is not None:
        aliases[len(operands)] = len(results)
        operands.append(summaries)
        results.append(_like(summaries))
    call = jax.ffi.ffi_call(
        "fluxion_append", results, has_side_effect=True, input_output_aliases=aliases
    )
    new_k, new_v, status, *rest = call(
        *operands, has_summaries=summaries is not None, has_first_row=bool(rows)
    )
    new_summaries = retag(rest[0], HOST) if rest else None
    return retag(new_k, HOST), retag(new_v, HOST), new_summaries, status


def submit(
    work: Work,
    k: jax.Array,
    v: jax.Array,
    summaries: jax.Array | None,
    *,
    scale: float,
    first_row: jax.Array | None = None,
) -> Tick:
    """Hands the host its share of one layer's attention; see `host_ops.api.submit`.

    Args:
      work: what to select and attend to.
      k: host cache `[B, K, P, 16, H]`, bfloat16, float16 or float32; only read.
      v: likewise.
      summaries: int8 `[B, K, U, 2, H]`, or None; then `work.bitmap` must be given.
      scale: factor of the attention scores.
      first_row: int32 `[1]` or None, see `host_ops.api.append`.

    Returns:
      The tick that `collect` needs. On the CPU backend the host writes its share there.
    """
    native.require()
    *operands, bitmap, status = work
    operands.append(jnp.zeros((1,), jnp.int32) if status is None else status)
    optional = [x for x in (summaries, bitmap) if x is not None]
    # What follows an asynchronous call of the CPU backend runs on the thread that completes it.
    # That may be an exchange between devices, which would wait on a worker for devices that wait
    # for workers. So there collect begins the tasks.
    begins = not compat.traced_for_many()
    delivers = begins and not compat.traced_for_gpu()
    results = [jax.ShapeDtypeStruct((2,), jnp.int32), *(_share(work) if delivers else [])]
    call = jax.ffi.ffi_call("fluxion_submit", results, has_side_effect=True)
    found = call(
        *([] if first_row is None else [first_row]),
        k,
        v,
        *operands,
        *optional,
        has_summaries=summaries is not None,
        has_bitmap=bitmap is not None,
        scale=np.float32(scale),
        has_first_row=first_row is not None,
        begins=begins,
    )
    return Tick(*found)


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
    return_selection: bool,
    first_row: jax.Array | None = None,
) -> Collected:
    """Waits for the host's share, then writes the flush; see `host_ops.api.collect`.

    Args:
      tick: of the `submit` of the same layer and step.
      work: the same as given to `submit`.
      k: host cache `[B, K, P, 16, H]`, the same buffers as given to `submit`.
      v: likewise.
      summaries: int8 `[B, K, U, 2, H]`, or None if they are kept on the device.
      flush: the blocks to write after all reads of this step.
      after: small arrays that must have been computed before.
      scale: unused, known since `submit`.
      return_selection: whether to bring back the selection of the tasks.
      first_row: int32 `[1]` or None, the same as given to `submit`.

    Returns:
      The caches, the host's share and what it cost.
    """
    del scale
    native.require()
    batch, heads, _ = work.q.shape
    kv_heads, blocks = k.shape[1:3]
    small = [
        *_share(work),
        jax.ShapeDtypeStruct((1,), jnp.int32),
        jax.ShapeDtypeStruct((len(TIMES),), jnp.float32),
        jax.ShapeDtypeStruct((batch, kv_heads), jnp.int32),
        jax.ShapeDtypeStruct((batch, kv_heads), jnp.int32),
    ]
    selection = [jax.ShapeDtypeStruct((batch, heads, -(-blocks // 32)), jnp.uint32)]
    selection = selection if return_selection else []
    rows = [] if first_row is None else [first_row]
    if compat.traced_for_gpu():
        k, v, summaries = _keep((k, v, summaries), (tick.slot, *after))
        optional = [x for x in (summaries,) if x is not None]
        call = jax.ffi.ffi_call("fluxion_collect", [*small, *selection], has_side_effect=True)
        found = call(
            *rows,
            k,
            v,
            tick.slot,
            *flush,
            *optional,
            has_summaries=summaries is not None,
            return_selection=return_selection,
            has_first_row=bool(rows),
            delivered=False,
        )
        k, v, summaries = _keep((k, v, summaries), (found[2],))
        return Collected(k, v, summaries, *found, *([] if return_selection else [None]))
    operands = [*rows, k, v, tick.slot, *flush]
    results = [_like(k), _like(v), *small]
    aliases = {len(rows): 0, len(rows) + 1: 1}
    delivered = False
    if tick.out is not None and tick.lse is not None:
        delivered = True
        aliases |= {len(operands): 2, len(operands) + 1: 3}
        operands += [tick.out, tick.lse]
    if summaries is not None:
        aliases[len(operands)] = len(results)
        operands.append(summaries)
        results.append(_like(summaries))
    results += selection
    call = jax.ffi.ffi_call(
        "fluxion_collect", results, has_side_effect=True, input_output_aliases=aliases
    )
    new_k, new_v, out, lse, status, times, blocks_read, units_scanned, *rest = call(
        *operands,
        *after,
        has_summaries=summaries is not None,
        return_selection=return_selection,
        has_first_row=bool(rows),
        delivered=delivered,
    )
    return Collected(
        k=retag(new_k, HOST),
        v=retag(new_v, HOST),
        summaries=retag(rest.pop(0), HOST) if summaries is not None else None,
        out=out,
        lse=lse,
        status=status,
        times=times,
        blocks_read=blocks_read,
        units_scanned=units_scanned,
        selection=rest.pop(0) if return_selection else None,
    )


def _keep(
    cache: tuple[jax.Array, jax.Array, jax.Array | None], after: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The same buffers, for what comes after `after` and before whatever takes them next."""

    def keep(x: jax.Array) -> jax.Array:
        call = jax.ffi.ffi_call(
            "fluxion_keep", _like(x), has_side_effect=True, input_output_aliases={0: 0}
        )
        return retag(call(x, *after), HOST)

    k, v, summaries = cache
    return keep(k), keep(v), None if summaries is None else keep(summaries)


def _share(work: Work) -> list[jax.ShapeDtypeStruct]:
    return [
        jax.ShapeDtypeStruct(work.q.shape, jnp.float32),
        jax.ShapeDtypeStruct(work.q.shape[:2], jnp.float32),
    ]


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
