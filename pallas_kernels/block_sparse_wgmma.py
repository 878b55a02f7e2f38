"""Block-sparse attention on the tensor cores of Hopper, as a Mosaic GPU kernel.

For bfloat16 keys and values. The copy engine brings blocks into shared memory several tiles ahead,
and the tokens are the rows of the matrix products, the query heads of a group their columns: tiles
are multiplied as they lie in memory, and no row is wasted on padding. Float32 accuracy is kept by
cutting the float32 factor into bfloat16 parts, whose products with bfloat16 are exact in float32.

Axes: B batch, N query heads, K KV heads, G = N // K, G' = G padded to eights, P blocks of C tokens,
H head size, T = B * K tasks (one KV head of one sequence).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_list_triton import block_table_triton
from pallas_kernels.block_table import MAX_GROUP, BlockTable
from pallas_kernels.cache_rows import row_operand
from pallas_kernels.compat import (
    compute_capability,
    mosaic_load,
    mosaic_store,
)
from pallas_kernels.merge_shares_triton import merge_shares
from pallas_kernels.registry import UnsupportedImplementationError, require_gpu

TILE_TOKENS = 64
"""Tokens of one loop step: the rows of a tensor-core instruction."""

PARTS = 3
"""Bfloat16 numbers whose sum is a float32 number, exactly."""

SWIZZLE_BYTES = 128

TILE = plgpu.Layout.WGMMA
PER_TOKEN = TILE.reduce(1)
PER_HEAD = TILE.reduce(0)


class Tiling(NamedTuple):
    """How the work is cut.

    Attributes:
      programs: shares that the blocks of all tasks are cut into: two for each multiprocessor of an
        H100.
      stages: tiles in shared memory, all but one of them in flight.
    """

    programs: int = 264
    stages: int = 3


TILING = Tiling()


def block_sparse_attention_wgmma(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bitmap: jax.Array,
    *,
    scale: float,
    tiling: Tiling = TILING,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends to selected blocks; see `pallas_kernels.block_sparse_attention`.

    Args:
      q: float32 or bfloat16 `[B, N, H]`.
      k: bfloat16 `[B, K, P, C, H]`, in device or pinned host memory.
      v: likewise.
      bitmap: uint32 `[B, N, W]`.
      scale: multiplies `q . k`.
      tiling: how the work is cut.
      interpret: parameters of the interpreter, to run on any platform, slowly; for tests.

    Returns:
      `out` float32 `[B, N, H]` and `lse` float32 `[B, N]`.

    Raises:
      UnsupportedImplementationError: if sizes, dtype or device do not suit the kernel.
    """
    out, lse, _ = share_attention_wgmma(
        q, k, v, bitmap, None, scale=scale, tiling=tiling, interpret=interpret
    )
    return out, lse


def share_attention_wgmma(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bitmap: jax.Array,
    boundary: jax.Array | None,
    first_row: jax.Array | None = None,
    *,
    scale: float,
    tiling: Tiling = TILING,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attends to the blocks from a boundary on; see `pallas_kernels.share_attention`."""
    _, num_kv_heads, num_blocks, block_tokens, head_dim = k.shape
    if interpret is None:
        _check_device()
    if k.dtype != jnp.bfloat16:
        raise UnsupportedImplementationError(
            f"expected bfloat16 keys and values, got {k.dtype}; use 'triton'"
        )
    _check_sizes(head_dim, block_tokens, q.shape[1] // num_kv_heads)
    table = block_table_triton(
        bitmap, num_kv_heads, num_blocks, interpret is not None, boundary=boundary
    )
    state = attend_to_table(
        q, k, v, table, first_row, scale=scale, tiling=tiling, interpret=interpret
    )
    return *state, table.total.reshape(-1, num_kv_heads)


def _check_device() -> None:
    require_gpu()
    capability = compute_capability()
    if capability is not None and capability[0] != 9:
        raise UnsupportedImplementationError(
            f"expected compute capability 9.0, got {capability[0]}.{capability[1]}; use 'triton'"
        )


def _check_sizes(head_dim: int, block_tokens: int, group: int) -> None:
    if head_dim not in (64, 128, 256):
        raise UnsupportedImplementationError(
            f"expected a head size of 64, 128 or 256, got {head_dim}; use 'xla'"
        )
    if TILE_TOKENS % block_tokens or block_tokens % 8:
        raise UnsupportedImplementationError(
            f"expected blocks of 8, 16, 32 or 64 tokens, got {block_tokens}; use 'xla'"
        )
    if group > MAX_GROUP:
        raise UnsupportedImplementationError(
            f"expected at most {MAX_GROUP} query heads per KV head, got {group}; use 'xla'"
        )


def attend_to_table(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    table: BlockTable,
    first_row: jax.Array | None = None,
    *,
    scale: float,
    tiling: Tiling = TILING,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends to the blocks of a table; the rest is as in `share_attention_wgmma`."""
    batch, num_heads, head_dim = q.shape
    _, num_kv_heads, _, block_tokens, _ = k.shape
    group = num_heads // num_kv_heads
    tasks = batch * num_kv_heads
    heads = -(-group // 8) * 8
    tile_blocks = TILE_TOKENS // block_tokens
    # A share that is not full costs a program for each task.
    programs = tiling.programs + tasks
    queries = (q.astype(jnp.float32) * scale).reshape(tasks, group, head_dim)
    queries = jnp.pad(queries, [(0, 0), (0, heads - group), (0, 0)])
    tiled = (plgpu.TilingTransform((8, SWIZZLE_BYTES // 2)), plgpu.SwizzleTransform(SWIZZLE_BYTES))

    def smem(*shape: int) -> Any:
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=tiled)

    attend = plgpu.kernel(
        functools.partial(_kernel, tiling=tiling, group=group, has_rows=first_row is not None),
        out_type=[
            jax.ShapeDtypeStruct((programs, head_dim, heads), jnp.float32),
            jax.ShapeDtypeStruct((programs, heads), jnp.float32),
        ],
        scratch_types=[
            smem(PARTS, heads, head_dim),
            smem(tiling.stages, TILE_TOKENS, head_dim),
            smem(tiling.stages, TILE_TOKENS, head_dim),
            smem(PARTS, heads, TILE_TOKENS),
            plgpu.Barrier(num_arrivals=PARTS),
            plgpu.Barrier(num_arrivals=tile_blocks, num_barriers=tiling.stages),
            plgpu.Barrier(num_arrivals=tile_blocks, num_barriers=tiling.stages),
        ],
        grid=(programs,),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            # Every store that another thread reads has a barrier of its own below.
            unsafe_no_auto_barriers=True,
        ),
        interpret=interpret,
    )
    out, lse = attend(_cut(queries), k, v, *table, *row_operand(first_row))
    out, lse = merge_shares(
        out, lse, table.total, group, tiling.programs, tile_blocks, interpret is not None
    )
    return out.reshape(q.shape), lse.reshape(batch, num_heads)


def _cut(x: jax.Array) -> jax.Array:
    """Bfloat16 arrays that sum up to the float32 array, along a new axis 1, smallest first."""
    parts = []
    for _ in range(PARTS):
        # Cut, not rounded: XLA may take a conversion there and back for none at all.
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-65536)
        part = jax.lax.bitcast_convert_type(bits, jnp.float32)
        parts.append(part.astype(jnp.bfloat16))
        x -= part
    return jnp.stack(parts[::-1], axis=1)


class _Share(NamedTuple):
    """Which entries of which table a program takes: `first` to `end`, of `task`."""

    program: jax.Array
    task: jax.Array
    first: jax.Array
    end: jax.Array


class _Refs(NamedTuple):
    """Arguments and scratch memory of the kernel, in its order; the first row may be None."""

    queries: Any
    k: Any
    v: Any
    block: Any
    heads: Any
    total: Any
    first_row: Any
    out: Any
    lse: Any
    q_tile: Any
    k_tiles: Any
    v_tiles: Any
    weights: Any
    q_ready: Any
    k_ready: Any
    v_ready: Any


def _kernel(*refs: Any, tiling: Tiling, group: int, has_rows: bool) -> None:
    """One share of one task's blocks; a program without a share writes nothing."""
    r = _Refs(*(refs if has_rows else (*refs[:6], None, *refs[6:])))
    tile_blocks = TILE_TOKENS // r.k.shape[3]
    program = jax.lax.axis_index("program")
    share, has_share = _share_of(program, r.total, tiling.programs, tile_blocks)

    @pl.when(has_share)
    def attend_own_share() -> None:
        for i in range(PARTS):
            plgpu.copy_gmem_to_smem(r.queries.at[share.task, i], r.q_tile.at[i], r.q_ready)
        finite = _attend_share(r, share, None, tiling.stages)

        # A weight of zero does not silence a NaN that only another head selected: the heads then
        # take their turns, each reading nothing but its own blocks.
        @pl.when(jnp.logical_not(finite))
        def one_after_the_other() -> None:
            @pl.loop(0, group)
            def attend_alone(head: jax.Array) -> None:
                _attend_share(r, share, head, tiling.stages)


def _share_of(
    program: jax.Array, total_ref: Any, programs: int, tile_blocks: int
) -> tuple[_Share, jax.Array]:
    """The same cut as in `shares`, in scalars."""
    totals = [total_ref[task] for task in range(total_ref.shape[0])]
    tiles = (sum(totals) + programs * tile_blocks - 1) // (programs * tile_blocks)
    blocks = jnp.maximum(tiles, 1) * tile_blocks
    own_task, own_first, own_end = jnp.int32(0), jnp.int32(0), jnp.int32(0)
    end = jnp.int32(0)
    for task, total in enumerate(totals):
        start, end = end, end + (total + blocks - 1) // blocks
        mine = (start <= program) & (program < end)
        own_task = jnp.where(mine, task, own_task)
        own_first = jnp.where(mine, (program - start) * blocks, own_first)
        own_end = jnp.where(mine, jnp.minimum((program - start + 1) * blocks, total), own_end)
    return _Share(program, own_task, own_first, own_end), program < end


def _attend_share(r: _Refs, share: _Share, alone: jax.Array | None, stages: int) -> jax.Array:
    """Attends with all heads, or with one alone; tells whether the sums are finite."""
    _, num_kv_heads, _, block_tokens, head_dim = r.k.shape
    padded_group = r.q_tile.shape[1]
    tile_blocks = TILE_TOKENS // block_tokens
    row, kv_head = share.task // num_kv_heads, share.task % num_kv_heads
    row = row if r.first_row is None else r.first_row[0] + row
    steps = (share.end - share.first + tile_blocks - 1) // tile_blocks

    def heads_of(entry: jax.Array) -> jax.Array:
        heads = r.heads[share.task, jnp.minimum(entry, share.end - 1)]
        return heads if alone is None else heads & (1 << alone)

    def block_of(entry: jax.Array) -> jax.Array:
        return r.block[share.task, jnp.minimum(entry, share.end - 1)]

    def search(entry: jax.Array, found: jax.Array) -> jax.Array:
        return jnp.where(heads_of(entry) != 0, block_of(entry), found)

    if alone is not None:
        own_block = jax.lax.fori_loop(share.first, share.end, search, jnp.int32(0))

    def tile_of(step: jax.Array | int) -> tuple[list[jax.Array], list[jax.Array]]:
        """Blocks and heads of a tile; past the end no head attends to the last block again."""
        entries = [share.first + step * tile_blocks + i for i in range(tile_blocks)]
        blocks = [block_of(entry) for entry in entries]
        heads = [jnp.where(entry < share.end, heads_of(entry), 0) for entry in entries]
        if alone is not None:
            # What the head does not attend to is not read: a block of its own takes the place.
            blocks = [jnp.where(h != 0, b, own_block) for b, h in zip(blocks, heads, strict=True)]
        return blocks, heads

    def fetch(step: jax.Array | int, blocks: list[jax.Array]) -> None:
        slot = jax.lax.rem(jnp.int32(step), jnp.int32(stages))
        for cache, tiles, ready in ((r.k, r.k_tiles, r.k_ready), (r.v, r.v_tiles, r.v_ready)):
            for i, block in enumerate(blocks):
                rows = pl.ds(i * block_tokens, block_tokens)
                plgpu.copy_gmem_to_smem(
                    cache.at[row, kv_head, block], tiles.at[slot, rows], ready.at[slot]
                )

    block_of_token = (
        plgpu.broadcasted_iota(jnp.int32, (TILE_TOKENS,), 0, layout=PER_TOKEN) // block_tokens
    )
    tile_shape = (TILE_TOKENS, padded_group)
    head = plgpu.broadcasted_iota(jnp.int32, tile_shape, 1, layout=TILE)

    def attend_tile(step: jax.Array, carry: Any) -> Any:
        (largest, denominator, weighted), heads, (blocks_ahead, heads_ahead) = carry
        # Looked up long before they are needed, so that nobody waits for them.
        looked_up = tile_of(step + stages)

        slot = jax.lax.rem(step, jnp.int32(stages))
        plgpu.barrier_wait(r.k_ready.at[slot])
        scores = _product(
            tile_shape,
            r.k_tiles.at[slot],
            [r.q_tile.at[i].transpose((1, 0)) for i in range(PARTS)],
        )
        # After this, all warps are done with the tile before and with its weights.
        plgpu.commit_smem()

        @pl.when(step + stages - 1 < steps)
        def fetch_ahead() -> None:
            fetch(step + stages - 1, blocks_ahead)

        chosen = plgpu.layout_cast(jnp.zeros((TILE_TOKENS,), jnp.int32), PER_TOKEN)
        for i in range(tile_blocks):
            chosen = jnp.where(block_of_token == i, heads[0][i], chosen)
        chosen = jax.lax.broadcast_in_dim(chosen, tile_shape, (0,))
        scores = jnp.where(((chosen >> head) & 1) != 0, scores, -jnp.inf)
        new_largest = jnp.maximum(largest, jnp.max(scores, axis=0))
        finite = jnp.where(new_largest == -jnp.inf, 0.0, new_largest)
        weights = jnp.exp(scores - jax.lax.broadcast_in_dim(finite, tile_shape, (1,)))
        decay = jnp.exp(largest - finite)
        rest = weights
        for i in reversed(range(PARTS)):
            part = rest.astype(jnp.bfloat16)
            rest -= part.astype(jnp.float32)
            transposed = r.weights.at[i].transpose((1, 0))
            transposed[...] = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()

        plgpu.barrier_wait(r.v_ready.at[slot])
        product = _product(
            (head_dim, padded_group),
            r.v_tiles.at[slot].transpose((1, 0)),
            [r.weights.at[i].transpose((1, 0)) for i in range(PARTS)],
        )
        sums = (
            new_largest,
            # Summed over the tokens of a tile only at the end.
            denominator * jax.lax.broadcast_in_dim(decay, tile_shape, (1,)) + weights,
            weighted * jax.lax.broadcast_in_dim(decay, weighted.shape, (1,)) + product,
        )
        return sums, [*heads[1:], heads_ahead], looked_up

    first_tiles = [tile_of(step) for step in range(stages)]
    for step, (blocks, _) in enumerate(first_tiles[:-1]):

        @pl.when(step < steps)
        def fetch_first(step: int = step, blocks: list[jax.Array] = blocks) -> None:
            fetch(step, blocks)

    if alone is None:
        plgpu.barrier_wait(r.q_ready)
    start = (
        plgpu.layout_cast(jnp.full((padded_group,), -jnp.inf, jnp.float32), PER_HEAD),
        plgpu.layout_cast(jnp.zeros(tile_shape, jnp.float32), TILE),
        plgpu.layout_cast(jnp.zeros((head_dim, padded_group), jnp.float32), TILE),
    )
    first_heads = [heads for _, heads in first_tiles[:-1]]
    (largest, denominator, weighted), _, _ = jax.lax.fori_loop(
        0, steps, attend_tile, (start, first_heads, first_tiles[-1])
    )
    # All warps must be done with the last tile before another pass fetches its first.
    plgpu.commit_smem()
    denominator = jnp.sum(denominator, axis=0)
    divisor = jnp.where(denominator == 0.0, 1.0, denominator)
    out = weighted / jax.lax.broadcast_in_dim(divisor, weighted.shape, (1,))
    lse = jnp.where(denominator == 0.0, -jnp.inf, largest + jnp.log(divisor))
    if alone is not None:
        row = plgpu.broadcasted_iota(jnp.int32, weighted.shape, 1, layout=TILE)
        out = jnp.where(row == alone, out, mosaic_load(r.out.at[share.program], TILE))
        column = plgpu.broadcasted_iota(jnp.int32, (padded_group,), 0, layout=PER_HEAD)
        lse = jnp.where(column == alone, lse, mosaic_load(r.lse.at[share.program], PER_HEAD))
    mosaic_store(r.out.at[share.program], out)
    mosaic_store(r.lse.at[share.program], lse)
    unknown = jnp.where(jnp.abs(weighted) < jnp.inf, 0.0, 1.0)
    return jnp.max(jnp.max(unknown, axis=0), axis=0) == 0.0


def _product(shape: tuple[int, int], a: Any, parts: list[Any]) -> jax.Array:
    """The product of `a` with the sum of the parts."""

    def multiply(accumulator: Any) -> jax.Array:
        for part in parts:
            plgpu.wgmma(accumulator, a, part)
        plgpu.wgmma_wait(0)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
