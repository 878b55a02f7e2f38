"""The host operations, whatever implements them: the NumPy, XLA and native tiers behind one call.

`implementation` is None, a name or a sequence of names:

* None: the native library if it can be loaded, else XLA on the CPU backend, with one warning;
* a name ("native", "xla", "numpy"): that one, or `UnavailableError` with the reason;
* a sequence: the first that can be used; if none can, the error lists every reason.

`submit` and `collect` of one layer must be given the same `implementation`; a tick of another one
ends in `STATUS_INVALID`. `k`, `v` and `summaries` are typed as host memory (`pinned_host`) and
come back so typed, the same buffers if the enclosing `jax.jit` donates them.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp

from host_ops import arguments, ordering, rows
from host_ops.errors import UnavailableError
from host_ops.types import Collected, Flush, Tick, Work

_MODULES = {"native": "host_ops.ffi", "xla": "host_ops.xla", "numpy": "host_ops.callback"}
_DEFAULT = ("native", "xla")

Implementation: TypeAlias = str | tuple[str, ...] | None

Result = TypeVar("Result")


def append(
    k: jax.Array,
    v: jax.Array,
    summaries: jax.Array | None,
    flush: Flush,
    after: tuple[jax.Array, ...] = (),
    *,
    first_row: jax.Array | None = None,
    implementation: str | Sequence[str] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
    """Writes whole blocks and their summaries into the host cache and waits for it; for prefill.

    Args:
      k: host cache `[B, K, P, 16, H]`, bfloat16, float16 or float32.
      v: likewise.
      summaries: int8 `[B, K, U, 2, H]`, or None if they are kept on the device.
      flush: the blocks; rows with `num_blocks == 0` are left alone. Summaries already written are
        requantised by `shift`, those of coarser units are folded.
      after: small arrays computed from the cache before it changes; only there so that this is so,
        and that no copy of the cache is needed for the readers. Default: nobody reads it.
      first_row: int32 `[1]` if the arrays hold several layers, as `[R, K, P, 16, H]` with R >= B:
        the call's sequences are the B rows from this one on.
      implementation: see the module.

    Returns:
      `(k, v, summaries, status int32 [1])`; the first three are the same buffers if donated. With
      a status other than 0 nothing was written.

    Raises:
      ValueError: a shape or dtype is wrong.
      UnavailableError: no implementation asked for can be used.
    """
    arguments.check_cache(k, v, summaries)
    arguments.check_flush(flush, rows.of_one_layer(k, flush.num_blocks.shape[0], first_row))
    flush = flush._replace(num_blocks=ordering.after(flush.num_blocks, after))
    more: dict[str, Any] = {}
    if first_row is not None:
        if chosen(implementation) == "native":
            more["first_row"] = first_row
        else:
            flush = rows.spread_rows(flush, first_row, k.shape[0])
    return _call("append", implementation, lambda op: op(k, v, summaries, flush, **more))


def submit(
    work: Work,
    k: jax.Array,
    v: jax.Array,
    summaries: jax.Array | None,
    *,
    scale: float,
    first_row: jax.Array | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Tick:
    """Hands the host its share of one layer's attention.

    On a GPU the program goes on meanwhile. On the CPU backend what takes the tick comes when the
    host has done its share, on one of its threads.

    Args:
      work: what to select and attend to.
      k: host cache `[B, K, P, 16, H]`, bfloat16, float16 or float32; only read.
      v: likewise.
      summaries: int8 `[B, K, U, 2, H]`, or None; then `work.bitmap` must be given.
      scale: factor of the attention scores.
      first_row: see `append`.
      implementation: see the module.

    Returns:
      The tick that `collect` needs. Let the device's share depend on its slot
      (`jax.lax.optimization_barrier`), so that the host starts first.

    Raises:
      ValueError: a shape or dtype is wrong.
      UnavailableError: no implementation asked for can be used.
    """
    arguments.check_cache(k, v, summaries)
    arguments.check_work(
        work, rows.of_one_layer(k, work.host_blocks.shape[0], first_row), summaries
    )
    more: dict[str, Any] = {}
    # The other implementations look at nothing before collect.
    if first_row is not None and chosen(implementation) == "native":
        more["first_row"] = first_row
    return _call(
        "submit", implementation, lambda op: op(work, k, v, summaries, scale=scale, **more)
    )


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
    first_row: jax.Array | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Collected:
    """Waits for the host's share, then writes the blocks that leave the resident window.

    Args:
      tick: of the `submit` of the same layer and step.
      work: the same as given to `submit`.
      k: host cache `[B, K, P, 16, H]`, the same buffers as given to `submit`.
      v: likewise.
      summaries: int8 `[B, K, U, 2, H]`, or None if they are kept on the device.
      flush: the blocks to write after all reads of this step.
      after: small arrays of the device's share, for instance its lse; only there so that the
        device works before it waits, and reads the cache before it changes.
      scale: the same as given to `submit`.
      return_selection: whether to bring back the selection of the tasks with `boundary > 0`.
      first_row: the same as given to `submit`.
      implementation: see the module.

    Returns:
      The host's share, the caches, and what it cost. `times` are NaN from the XLA tier, which has
      no clock.

    Raises:
      ValueError: a shape or dtype is wrong.
      UnavailableError: no implementation asked for can be used.
    """
    arguments.check_tick(tick)
    arguments.check_cache(k, v, summaries)
    batch = work.host_blocks.shape[0]
    layer = rows.of_one_layer(k, batch, first_row)
    arguments.check_work(work, layer, summaries)
    arguments.check_flush(flush, layer)
    more: dict[str, Any] = {}
    work = work if chosen(implementation) == "native" else _unless_failed(work)
    spread = first_row is not None and chosen(implementation) != "native"
    if first_row is not None:
        if spread:
            work = rows.spread_rows(work, first_row, k.shape[0])
            flush = rows.spread_rows(flush, first_row, k.shape[0])
        else:
            more["first_row"] = first_row
    found = _call(
        "collect",
        implementation,
        lambda op: op(
            tick,
            work,
            k,
            v,
            summaries,
            flush,
            after,
            scale=scale,
            return_selection=return_selection,
            **more,
        ),
    )
    if spread and first_row is not None:
        return rows.take_collected(found, first_row, batch)
    return found


def _unless_failed(work: Work) -> Work:
    """The work without a status, on which XLA's operations need not look."""
    if work.status is None:
        return work
    host_blocks = jnp.where(work.status[0] == 0, work.host_blocks, 0)
    return work._replace(host_blocks=host_blocks, status=None)


def available() -> dict[str, str | None]:
    """Returns for every implementation None if it can be used here, else the reason why not."""
    return {name: _unavailable_reason(name) for name in _MODULES}


def chosen(implementation: str | Sequence[str] | None = None) -> str:
    """Returns the name of the implementation that a call with this argument would use.

    Raises:
      UnavailableError: no implementation asked for can be used.
    """
    return _choose("an operation", implementation)


def _unavailable_reason(name: str) -> str | None:
    # The wrapper of the native library can always be imported, the library not always loaded.
    module = "host_ops.native" if name == "native" else _MODULES[name]
    reason: str | None = importlib.import_module(module).unavailable_reason()
    return reason


def _call(
    op: str,
    implementation: str | Sequence[str] | None,
    run: Callable[[Callable[..., Any]], Result],
) -> Result:
    module = importlib.import_module(_MODULES[_choose(op, implementation)])
    return run(getattr(module, op))


def _choose(op: str, implementation: str | Sequence[str] | None) -> str:
    if implementation is None:
        names: tuple[str, ...] = _DEFAULT
    else:
        names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    unknown = [name for name in names if name not in _MODULES]
    if unknown or not names:
        raise ValueError(
            f"implementation: expected None, one of {list(_MODULES)} or a sequence of them, "
            f"got {implementation!r}; leave it None for the best available"
        )
    reasons: list[str] = []
    for name in names:
        reason = _unavailable_reason(name)
        if reason is None:
            if implementation is None and reasons:
                _warn_fallback(name, reasons[0])
            return name
        reasons.append(f"{name}: {reason}")
    raise UnavailableError(
        f"expected a usable implementation of {op} among {list(names)}, got none: "
        + "; ".join(reasons)
        + "; install the native library or name another implementation"
    )


@functools.cache
def _warn_fallback(name: str, reason: str) -> None:
    warnings.warn(
        f"host_ops falls back to the {name!r} implementation, which is correct but slow and "
        f"overlaps nothing ({reason}). Install fluxion_jax from a wheel, or build it where CMake "
        f"and a C++17 compiler are found; pass implementation={name!r} to accept this in silence.",
        RuntimeWarning,
        stacklevel=5,
    )
