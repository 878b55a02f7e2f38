"""Block-sparse attention as a Mosaic GPU kernel, for Hopper and newer GPUs.

One warpgroup takes one split of one task. Keys and values may lie in pinned host memory: they are
loaded straight from there over the bus, several blocks in flight, and staged in shared memory, from
where all query heads of the group use them.

Decode attention at this place is bound by memory, so the kernel multiplies in float32 on ordinary
cores instead of tensor cores. That keeps float32 accuracy and exact masks per head.

Axes: B batch, N query heads, K KV heads, G = N // K, P blocks of C tokens, H head size, S splits.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_table import MAX_GROUP, BlockTable, block_table
from pallas_kernels.cache_rows import row_operand
from pallas_kernels.compat import compute_capability, mosaic_load
from pallas_kernels.merge_splits_triton import merge_splits
from pallas_kernels.registry import UnsupportedImplementationError, require_gpu

TILE_TOKENS = 64
"""Tokens of one loop step: the rows of the register layout in which a warpgroup reduces."""

PROGRAMS = 512
"""Programs in flight: a few on each of the 100 to 150 multiprocessors of a large GPU."""

MAX_HEAD_DIM = 256
"""Beyond it a tile of keys does not fit into the registers."""

TILE = plgpu.Layout.WGMMA
PER_TOKEN = TILE.reduce(1)
PER_CHANNEL = TILE.reduce(0)


def block_sparse_attention_mosaic(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bitmap: jax.Array,
    first_row: jax.Array | None = None,
    *,
    scale: float,
    programs: int = PROGRAMS,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends to selected blocks; see `pallas_kernels.block_sparse_attention`.

    Args:
      q: float32, bfloat16 or float16 `[B, N, H]`.
      k: float32, bfloat16 or float16 `[B, K, P, C, H]`, in device or pinned host memory.
      v: likewise.
      bitmap: uint32 `[B, N, W]`.
      first_row: int32 `[1]`, or None for a cache of one layer; see `share_attention`.
      scale: multiplies `q . k`.
      programs: programs in flight.
      interpret: parameters of the interpreter, to run on any platform, slowly; for tests.

    Returns:
      `out` float32 `[B, N, H]` and `lse` float32 `[B, N]`.

    Raises:
      UnsupportedImplementationError: if sizes or device do not suit the kernel.
    """
    _, num_kv_heads, num_blocks, block_tokens, head_dim = k.shape
    if interpret is None:
        _check_device()
    _check_sizes(head_dim, block_tokens, q.shape[1] // num_kv_heads)
    table = block_table(bitmap, num_kv_heads, num_blocks, TILE_TOKENS // block_tokens)
    return attend_to_table(
        q, k, v, table, first_row, scale=scale, programs=programs, interpret=interpret
    )


def attend_to_table(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    table: BlockTable,
    first_row: jax.Array | None = None,
    *,
    scale: float,
    programs: int = PROGRAMS,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends to the blocks of a table; the rest is as in `block_sparse_attention_mosaic`."""
    batch, num_heads, head_dim = q.shape
    _, num_kv_heads, _, block_tokens, _ = k.shape
    group = num_heads // num_kv_heads
    tasks = batch * num_kv_heads
    tile_blocks = TILE_TOKENS // block_tokens
    splits = max(1, min(table.block.shape[1] // tile_blocks, programs // tasks))
    attend = plgpu.kernel(
        functools.partial(_kernel, splits=splits),
        out_type=[
            jax.ShapeDtypeStruct((splits, tasks, group, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((splits, tasks, group), jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM((TILE_TOKENS, head_dim), k.dtype),
            plgpu.SMEM((TILE_TOKENS, head_dim), v.dtype),
            plgpu.SMEM((group, head_dim), jnp.float32),
        ],
        grid=(tasks, splits),
        grid_names=("task", "split"),
        # The layouts below are spelled out for lane semantics; the inference of the newer
        # warpgroup semantics finds no solution for them, and JAX 0.10 lacks parts of it.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )
    queries = (q.astype(jnp.float32) * scale).reshape(tasks, group, head_dim)
    out, lse = attend(queries, k, v, *table, *row_operand(first_row))
    out, lse = merge_splits(out, lse, interpret=bool(interpret))
    return out.reshape(q.shape), lse.reshape(batch, num_heads)


def _check_device() -> None:
    require_gpu()
    capability = compute_capability()
    if capability is not None and capability < (9, 0):
        raise UnsupportedImplementationError(
            f"expected compute capability 9.0 or newer, got {capability[0]}.{capability[1]}; use "
            "'triton'"
        )


def _check_sizes(head_dim: int, block_tokens: int, group: int) -> None:
    if head_dim % 64 or head_dim > MAX_HEAD_DIM:
        raise UnsupportedImplementationError(
            f"expected a head size of 64, 128, 192 or 256, got {head_dim}; use 'xla'"
        )
    if TILE_TOKENS % block_tokens or block_tokens % 8:
        raise UnsupportedImplementationError(
            f"expected blocks of 8, 16, 32 or 64 tokens, got {block_tokens}; use 'xla'"
        )
    if group > MAX_GROUP:
        raise UnsupportedImplementationError(
            f"expected at most {MAX_GROUP} query heads per KV head, got {group}; use 'xla'"
        )


def _kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    block_ref: Any,
    heads_ref: Any,
    total_ref: Any,
    *refs: Any,
    splits: int,
) -> None:
    """One split of one task: every `splits`-th tile of its table.

    The weighted sums of values live in shared memory (`weighted`, `[G, H]`), because those of a
    large group do not fit into registers.
    """
    *row_refs, out_ref, lse_ref, k_tile, v_tile, weighted = refs
    task, split = jax.lax.axis_index("task"), jax.lax.axis_index("split")
    num_kv_heads, _, block_tokens, head_dim = k_ref.shape[1:]
    group = weighted.shape[0]
    tile_blocks = TILE_TOKENS // block_tokens
    tile_shape = (TILE_TOKENS, head_dim)
    row, kv_head = task // num_kv_heads, task % num_kv_heads
    row = row_refs[0][0] + row if row_refs else row
    total = total_ref[task]
    block_of_token = (
        plgpu.broadcasted_iota(jnp.int32, (TILE_TOKENS,), 0, layout=PER_TOKEN) // block_tokens
    )

    def fetch(cache_ref: Any, tile: Any, first: jax.Array) -> None:
        # Past the end of the table the last block is read again; no head attends to it there.
        entries = [jnp.minimum(first + i, total - 1) for i in range(tile_blocks)]
        blocks = [cache_ref[row, kv_head, block_ref[task, entry]] for entry in entries]
        # Storing waits, so all loads are issued before.
        for i, block in enumerate(blocks):
            tile[pl.ds(i * block_tokens, block_tokens)] = block

    def attend_tile(step: jax.Array, sums: Any) -> Any:
        first = (split + step * splits) * tile_blocks
        fetch(k_ref, k_tile, first)
        fetch(v_ref, v_tile, first)
        heads = plgpu.layout_cast(jnp.zeros((TILE_TOKENS,), jnp.int32), PER_TOKEN)
        for i in range(tile_blocks):
            heads = jnp.where(block_of_token == i, heads_ref[task, first + i], heads)

        k = mosaic_load(k_tile, TILE).astype(jnp.float32)
        weights, masks, decays, new_sums = [], [], [], []
        for g in range(group):
            largest, denominator = sums[g]
            query = mosaic_load(q_ref.at[task, g], PER_CHANNEL)
            masks.append(((heads >> g) & 1) != 0)
            products = k * jax.lax.broadcast_in_dim(query, tile_shape, (1,))
            scores = jnp.where(masks[g], jnp.sum(products, axis=1), -jnp.inf)
            new_largest = jnp.maximum(largest, jnp.max(scores, axis=0))
            finite = jnp.where(new_largest == -jnp.inf, 0.0, new_largest)
            weights.append(jnp.exp(scores - finite))
            decays.append(jnp.exp(largest - finite))
            new_sums.append((new_largest, denominator * decays[g] + jnp.sum(weights[g], axis=0)))

        v = mosaic_load(v_tile, TILE).astype(jnp.float32)
        for g in range(group):
            mask = jax.lax.broadcast_in_dim(masks[g], tile_shape, (0,))
            weight = jax.lax.broadcast_in_dim(weights[g], tile_shape, (0,))
            # The mask, not the zero weight, keeps out a NaN that only another head selected.
            update = jnp.sum(jnp.where(mask, weight * v, 0.0), axis=0)
            weighted[g] = mosaic_load(weighted.at[g], PER_CHANNEL) * decays[g] + update
        return tuple(new_sums)

    for g in range(group):
        weighted[g] = plgpu.layout_cast(jnp.zeros((head_dim,), jnp.float32), PER_CHANNEL)
    tiles = (total + tile_blocks - 1) // tile_blocks
    steps = jnp.maximum(tiles - split + splits - 1, 0) // splits
    start = ((jnp.float32(-jnp.inf), jnp.float32(0.0)),) * group
    for g, (largest, denominator) in enumerate(jax.lax.fori_loop(0, steps, attend_tile, start)):
        divisor = jnp.where(denominator == 0.0, 1.0, denominator)
        out_ref[split, task, g] = mosaic_load(weighted.at[g], PER_CHANNEL) / divisor
        lse_ref[split, task, g] = jnp.where(
            denominator == 0.0, -jnp.inf, largest + jnp.log(divisor)
        )
