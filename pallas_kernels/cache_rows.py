"""Where a kernel finds the cache of a call in an array that holds those of several layers.

XLA must not cut an array in host memory. So a kernel gets the whole array and, as data, the first
of its call's rows. Axes: B sequences of the call, R rows of the array, K KV heads; a task is one KV
head of one sequence.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.registry import UnsupportedImplementationError


def fits_rows(rows: int, batch: int, first_row: jax.Array | None) -> bool:
    """Whether an array of R rows can hold the B sequences of a call."""
    if first_row is None:
        return rows == batch
    return rows >= batch and first_row.shape == (1,) and first_row.dtype == jnp.int32


def check_offsets(summaries: jax.Array) -> None:
    """Refuses arrays of bytes of which Triton would take other parts than those it is asked for.

    JAX computes offsets in 32 bits up to 4 GiB, and these count bytes from -2 GiB on.

    Raises:
      UnsupportedImplementationError: it is one of them.
    """
    if 2**31 < summaries.size <= 2**32:
        raise UnsupportedImplementationError(
            f"expected at most {2**31} bytes of summaries in one array or more than {2**32}, got "
            f"{summaries.size}; change max_tokens or batch, or give every layer an array of its own"
        )


def task_spec(shape: tuple[int, ...], first_row: jax.Array | None) -> pl.BlockSpec:
    """What a program sees of an array `[R, K, ...]`, if the first axis of the grid counts tasks.

    The part `[...]` of its task, or, with a first row, `[R, ...]` of its KV head; then
    `task_index` says where the task lies.
    """
    rows, kv_heads, *rest = shape
    zeros = (0,) * len(rest)
    if first_row is None:
        return pl.BlockSpec(
            (None, None, *rest), lambda task, _: (task // kv_heads, task % kv_heads, *zeros)
        )
    return pl.BlockSpec((rows, None, *rest), lambda task, _: (0, task % kv_heads, *zeros))


def row_operand(first_row: jax.Array | None) -> list[jax.Array]:
    """The first row as the last operand of a kernel, if there is one."""
    return [] if first_row is None else [first_row]


def row_spec(first_row: jax.Array | None) -> list[pl.BlockSpec]:
    """What belongs to `row_operand`: each program sees it."""
    return [] if first_row is None else [pl.BlockSpec((1,), lambda *_: (0,))]


def task_index(task: jax.Array, kv_heads: int, row_refs: list[Any]) -> tuple[jax.Array, ...]:
    """Within a kernel: the index that leads from what `task_spec` shows to a task's part of it."""
    return tuple(ref[0] + task // kv_heads for ref in row_refs)
