"""Attention of one query token to selected blocks of a long KV cache, grouped heads.

Every query head attends only to its own blocks, but a block that several heads of a group selected
is read once. The work is proportional to the selection, not to the cache.

Axes: B batch, N query heads, K KV heads, G = N // K, P blocks of C tokens, W bitmap words, H head
size. A *task* is one KV head of one sequence with its G query heads.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.bitmaps import (
    at_or_above,
    group_union,
    has_block,
    nth_block,
    num_words,
    popcount,
)
from pallas_kernels.cache_rows import fits_rows
from pallas_kernels.compat import take_rows
from pallas_kernels.registry import Implementation, dispatch

TILE_BLOCKS = 32
"""Blocks of one loop step of the XLA version. A tile of 32 blocks of 16 tokens, keys and values in
float32, is 256 KiB at a head size of 64 and stays in the second-level cache, while the fixed cost
of a loop step is spread over 512 tokens."""


def block_sparse_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bitmap: jax.Array,
    *,
    scale: float,
    implementation: Implementation = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends one query token per sequence to the blocks that the bitmap selects for each head.

    Scores, softmax and sums are float32. A NaN in a block that a head did not select never reaches
    that head; in a block that it did select it surfaces.

    Args:
      q: float32, bfloat16 or float16 `[B, N, H]`, not scaled.
      k: float32, bfloat16 or float16 `[B, K, P, C, H]`; K divides N.
      v: likewise.
      bitmap: uint32 `[B, N, W]`, the selected blocks; bits from P on must be zero.
      scale: multiplies `q . k`, usually `H ** -0.5`.
      implementation: "triton", "mosaic" and, for bfloat16 on tensor cores, "triton_mma" and
        "wgmma" (Hopper) run on a GPU and may read `k` and `v` from pinned host memory, "xla" runs
        everywhere on device memory; None for the best available.

    Returns:
      `out` float32 `[B, N, H]` and `lse` float32 `[B, N]` (natural log); 0 and `-inf` where nothing
      is selected.

    Raises:
      ValueError: if the shapes or dtypes do not fit together.
      UnsupportedImplementationError: if no implementation asked for works here.
    """
    out, lse, _ = share_attention(q, k, v, bitmap, None, scale=scale, implementation=implementation)
    return out, lse


def share_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bitmap: jax.Array,
    boundary: jax.Array | None,
    *,
    scale: float,
    first_row: jax.Array | None = None,
    implementation: Implementation = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same for the blocks from a boundary on: the device's share of every task.

    Kernels that list the blocks of the bitmap cut and count them on the way, which would be kernels
    of their own.

    Args:
      q: as for `block_sparse_attention`, like all but the next.
      k: likewise.
      v: likewise.
      bitmap: likewise.
      boundary: int32 `[B, K]`, blocks with an id below it are left out; None for none.
      scale: likewise.
      first_row: int32 `[1]` if `k` and `v` hold several layers, as `[R, K, P, C, H]` with R >= B:
        the call's sequences are the B rows from this one on, which must be there. None for arrays
        of one layer.
      implementation: likewise.

    Returns:
      `out` float32 `[B, N, H]`, `lse` float32 `[B, N]`, and int32 `[B, K]`, the blocks that were
      read, once for all heads of a group.

    Raises:
      ValueError: if the shapes or dtypes do not fit together.
      UnsupportedImplementationError: if no implementation asked for works here.
    """
    _check(q, k, v, bitmap, first_row)
    # On an H100 both read pinned memory equally fast, but Triton is faster over device memory.
    candidates = {
        "triton": _triton,
        "mosaic": _mosaic,
        "triton_mma": _triton_mma,
        "wgmma": _wgmma,
        "xla": _xla,
    }
    operands = (q, k, v, bitmap, boundary, first_row)
    return dispatch(  # type: ignore[no-any-return]
        "block_sparse_attention", implementation, candidates, *operands, scale=scale
    )


def _check(
    q: jax.Array, k: jax.Array, v: jax.Array, bitmap: jax.Array, first_row: jax.Array | None
) -> None:
    fits = (
        q.ndim == 3
        and k.ndim == 5
        and k.shape == v.shape
        and fits_rows(k.shape[0], q.shape[0], first_row)
        and k.shape[4] == q.shape[2]
        and q.shape[1] % k.shape[1] == 0
        and bitmap.shape == (*q.shape[:2], num_words(k.shape[2]))
        and bitmap.dtype == jnp.uint32
    )
    if not fits:
        raise ValueError(
            "expected q [B, N, H], k and v [B, K, P, C, H] with K dividing N, uint32 bitmap "
            f"[B, N, ceil(P / 32)], got q {q.shape}, k {k.shape}, v {v.shape}, bitmap "
            f"{bitmap.dtype} {bitmap.shape}; correct the shapes"
        )


class _Sums(NamedTuple):
    """Online softmax of every task: `[tasks, G]`, `[tasks, G]`, `[tasks, G, H]`."""

    largest: jax.Array
    total: jax.Array
    weighted: jax.Array


def _block_sparse_attention_xla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bitmap: jax.Array,
    first_row: jax.Array | None = None,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    batch, num_heads, head_dim = q.shape
    _, num_kv_heads, num_blocks, block_tokens, _ = k.shape
    tasks = batch * num_kv_heads
    group = num_heads // num_kv_heads
    queries = q.astype(jnp.float32).reshape(tasks, group, head_dim) * scale
    keys = k.reshape(-1, num_blocks, block_tokens, head_dim)
    values = v.reshape(-1, num_blocks, block_tokens, head_dim)
    first_task = 0 if first_row is None else first_row[0] * num_kv_heads
    bits = bitmap.reshape(tasks, group, -1)
    union = group_union(bitmap, num_kv_heads).reshape(tasks, -1)
    selected = popcount(union)
    last_step = jnp.cumsum((selected + TILE_BLOCKS - 1) // TILE_BLOCKS)

    def attend_tile(step: jax.Array, sums: _Sums) -> _Sums:
        task = jnp.sum(last_step <= step, dtype=jnp.int32)
        first_step = jnp.where(task > 0, last_step[task - 1], 0)
        rank = (step - first_step) * TILE_BLOCKS + jnp.arange(TILE_BLOCKS, dtype=jnp.int32)
        block = jnp.minimum(nth_block(union[task], rank), num_blocks - 1)
        mask = has_block(bits[task], jnp.broadcast_to(block, (group, TILE_BLOCKS)))
        mask = jnp.repeat(mask & (rank < selected[task]), block_tokens, axis=-1)
        tile_k = take_rows(keys, first_task + task, block).reshape(-1, head_dim)
        tile_v = take_rows(values, first_task + task, block).reshape(-1, head_dim)
        update = _attend(queries[task], tile_k, tile_v, mask, [part[task] for part in sums])
        return _Sums(*(part.at[task].set(new) for part, new in zip(sums, update, strict=True)))

    empty = _Sums(
        jnp.full((tasks, group), -jnp.inf, jnp.float32),
        jnp.zeros((tasks, group), jnp.float32),
        jnp.zeros((tasks, group, head_dim), jnp.float32),
    )
    largest, total, weighted = jax.lax.fori_loop(0, last_step[-1], attend_tile, empty)
    divisor = jnp.where(total == 0.0, 1.0, total)
    lse = jnp.where(total == 0.0, -jnp.inf, largest + jnp.log(divisor))
    return (weighted / divisor[..., None]).reshape(q.shape), lse.reshape(batch, num_heads)


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, sums: list[jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adds a tile to the sums of one task.

    q `[G, H]`, scaled; k, v `[tokens, H]`; mask `[G, tokens]`; sums `[G]`, `[G]`, `[G, H]`.
    """
    largest, total, weighted = sums
    scores = jnp.where(mask, jnp.dot(q, k.T, precision=jax.lax.Precision.HIGHEST), -jnp.inf)
    new_largest = jnp.maximum(largest, jnp.max(scores, axis=-1))
    finite = jnp.where(new_largest == -jnp.inf, 0.0, new_largest)
    weights = jnp.exp(scores - finite[:, None])
    decay = jnp.exp(largest - finite)
    product = jnp.dot(weights, v, precision=jax.lax.Precision.HIGHEST)
    # A weight of zero does not silence a NaN that only another head of the group selected, so a
    # tile that gives one is summed again under the mask. This costs nothing as long as all is
    # finite.
    product = jax.lax.cond(
        jnp.all(jnp.isfinite(product)),
        lambda: product,
        lambda: jnp.sum(jnp.where(mask[..., None], weights[..., None] * v, 0.0), axis=1),
    )
    return (
        new_largest,
        total * decay + jnp.sum(weights, axis=-1),
        weighted * decay[:, None] + product,
    )


def _xla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bitmap: jax.Array,
    boundary: jax.Array | None,
    first_row: jax.Array | None,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    bitmap, blocks = _cut(bitmap, boundary, k.shape[1])
    return *_block_sparse_attention_xla(q, k, v, bitmap, first_row, scale=scale), blocks


def _triton(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bitmap: jax.Array,
    boundary: jax.Array | None,
    first_row: jax.Array | None,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    from pallas_kernels.block_sparse_triton import share_attention_triton

    return share_attention_triton(q, k, v, bitmap, boundary, first_row, scale=scale)


def _mosaic(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bitmap: jax.Array,
    boundary: jax.Array | None,
    first_row: jax.Array | None,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    from pallas_kernels.block_sparse_mosaic import block_sparse_attention_mosaic

    bitmap, blocks = _cut(bitmap, boundary, k.shape[1])
    return *block_sparse_attention_mosaic(q, k, v, bitmap, first_row, scale=scale), blocks


def _triton_mma(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bitmap: jax.Array,
    boundary: jax.Array | None,
    first_row: jax.Array | None,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    from pallas_kernels.block_sparse_triton_mma import share_attention_triton_mma

    return share_attention_triton_mma(q, k, v, bitmap, boundary, first_row, scale=scale)


def _wgmma(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bitmap: jax.Array,
    boundary: jax.Array | None,
    first_row: jax.Array | None,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    from pallas_kernels.block_sparse_wgmma import share_attention_wgmma

    return share_attention_wgmma(q, k, v, bitmap, boundary, first_row, scale=scale)


def _cut(
    bitmap: jax.Array, boundary: jax.Array | None, num_kv_heads: int
) -> tuple[jax.Array, jax.Array]:
    """The bitmap from the boundary on, and how many blocks each task has in it."""
    bitmap = bitmap if boundary is None else at_or_above(bitmap, boundary)
    return bitmap, popcount(group_union(bitmap, num_kv_heads))
