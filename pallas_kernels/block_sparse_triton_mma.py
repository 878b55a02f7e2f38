"""Block-sparse attention on tensor cores as a Pallas kernel in the Triton style.

For bfloat16 keys and values. The tokens are the rows of the matrix products and the query heads of
a group their columns: a tile of keys is then multiplied as it lies in memory, and no row is wasted
on padding. Float32 accuracy is kept by cutting the float32 factor into bfloat16 parts, whose
products with bfloat16 are exact in float32.

Axes: B batch, N query heads, K KV heads, G = N // K, P blocks of C tokens, H head size, T = B * K
tasks (one KV head of one sequence).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.block_list_triton import block_table_triton
from pallas_kernels.block_table import MAX_GROUP, BlockTable
from pallas_kernels.cache_rows import row_operand
from pallas_kernels.compat import silence_triton_deprecation
from pallas_kernels.exact_products import cut_float32
from pallas_kernels.merge_shares_triton import load_padded, merge_shares
from pallas_kernels.registry import UnsupportedImplementationError, require_gpu
from pallas_kernels.shares import shares


class Tiling(NamedTuple):
    """How the work is cut.

    Attributes:
      tile_tokens: tokens of one loop step, a multiple of 64 for the widest tensor-core
        instructions.
      num_warps: warps of a program.
      programs: shares that the blocks of all tasks are cut into: two for each multiprocessor of an
        H100.
      num_stages: of the loop over tiles, all but one of which are loads in flight.
    """

    tile_tokens: int = 64
    num_warps: int = 4
    programs: int = 264
    num_stages: int = 4


TILING = Tiling()

MIN_HEADS = 16
"""Columns of the narrowest matrix product that Triton takes."""


def block_sparse_attention_triton_mma(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bitmap: jax.Array,
    *,
    scale: float,
    tiling: Tiling = TILING,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attends to selected blocks; see `pallas_kernels.block_sparse_attention`.

    Args:
      q: float32 or bfloat16 `[B, N, H]`.
      k: bfloat16 `[B, K, P, C, H]`, in device or pinned host memory.
      v: likewise.
      bitmap: uint32 `[B, N, W]`.
      scale: multiplies `q . k`.
      tiling: how the work is cut.
      interpret: run on any platform, slowly; for tests.

    Returns:
      `out` float32 `[B, N, H]` and `lse` float32 `[B, N]`.

    Raises:
      UnsupportedImplementationError: if sizes, dtype or platform do not suit the kernel.
    """
    out, lse, _ = share_attention_triton_mma(
        q, k, v, bitmap, None, scale=scale, tiling=tiling, interpret=interpret
    )
    return out, lse


def share_attention_triton_mma(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bitmap: jax.Array,
    boundary: jax.Array | None,
    first_row: jax.Array | None = None,
    *,
    scale: float,
    tiling: Tiling = TILING,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attends to the blocks from a boundary on; see `pallas_kernels.share_attention`."""
    _, num_kv_heads, num_blocks, block_tokens, head_dim = k.shape
    require_gpu(interpret)
    if k.dtype != jnp.bfloat16:
        raise UnsupportedImplementationError(
            f"expected bfloat16 keys and values, got {k.dtype}; use 'triton'"
        )
    _check_sizes(head_dim, block_tokens, q.shape[1] // num_kv_heads)
    table = block_table_triton(bitmap, num_kv_heads, num_blocks, interpret, boundary=boundary)
    state = attend_to_table(
        q, k, v, table, first_row, scale=scale, tiling=tiling, interpret=interpret
    )
    return *state, table.total.reshape(-1, num_kv_heads)


def _check_sizes(head_dim: int, block_tokens: int, group: int) -> None:
    for name, size in (("head size", head_dim), ("tokens of a block", block_tokens)):
        if size & (size - 1):
            raise UnsupportedImplementationError(
                f"expected a power of two as {name}, got {size}; use 'xla'"
            )
    if head_dim < 16:
        raise UnsupportedImplementationError(
            f"expected a head size of at least 16, got {head_dim}; use 'xla'"
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
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attends to the blocks of a table; the rest is as in `share_attention_triton_mma`."""
    batch, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    group = num_heads // num_kv_heads
    tasks = batch * num_kv_heads
    # A share that is not full costs a program for each task.
    programs = tiling.programs + tasks
    silence_triton_deprecation()
    out, lse = pl.pallas_call(
        functools.partial(_attend_kernel, tiling=tiling, num_kv_heads=num_kv_heads, scale=scale),
        grid=(programs,),
        out_shape=[
            jax.ShapeDtypeStruct((programs, head_dim, group), jnp.float32),
            jax.ShapeDtypeStruct((programs, group), jnp.float32),
        ],
        compiler_params=pltriton.CompilerParams(
            num_warps=tiling.num_warps, num_stages=tiling.num_stages
        ),
        interpret=interpret,
        name="block_sparse_attention",
    )(
        q.reshape(tasks, group, head_dim),
        k,
        v,
        table.block,
        table.heads,
        table.total,
        *row_operand(first_row),
    )
    tile_blocks = _tile_blocks(tiling, k)
    out, lse = merge_shares(out, lse, table.total, group, tiling.programs, tile_blocks, interpret)
    return out.reshape(q.shape), lse.reshape(batch, num_heads)


def _tile_blocks(tiling: Tiling, k: Any) -> int:
    return max(1, tiling.tile_tokens // k.shape[3])


class _Share(NamedTuple):
    """Which entries of which table a program takes: `first` to `end`, of `task`."""

    program: jax.Array
    task: jax.Array
    first: jax.Array
    end: jax.Array


def _attend_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    block_ref: Any,
    heads_ref: Any,
    total_ref: Any,
    *refs: Any,
    tiling: Tiling,
    num_kv_heads: int,
    scale: float,
) -> None:
    """One share of one task's blocks; a program without a share writes nothing."""
    *row_refs, out_ref, lse_ref = refs
    tasks, group, _ = q_ref.shape
    first_row = row_refs[0][0] if row_refs else 0
    total = load_padded(total_ref)
    cut = shares(total, tiling.programs, _tile_blocks(tiling, k_ref))
    program = pl.program_id(0)
    task = jnp.sum((cut.end <= program).astype(jnp.int32))

    @pl.when(task < tasks)
    def attend_own_share() -> None:
        own = jnp.arange(total.shape[0]) == task
        first_program = jnp.sum(jnp.where(own, cut.end - cut.programs, 0))
        first = (program - first_program) * cut.blocks
        end = jnp.minimum(first + cut.blocks, jnp.sum(jnp.where(own, total, 0)))
        attend = functools.partial(
            _attend_share,
            (q_ref, k_ref, v_ref, block_ref, heads_ref, out_ref, lse_ref),
            _Share(program, task, first, end),
            _tile_blocks(tiling, k_ref),
            num_kv_heads,
            first_row,
            scale,
        )
        finite = attend(-1)

        # A weight of zero does not silence a NaN that only another head selected: the heads then
        # take their turns, each reading nothing but its own blocks.
        @pl.when(jnp.logical_not(finite))
        def one_after_the_other() -> None:
            @pl.loop(0, group)
            def attend_alone(head: jax.Array) -> None:
                attend(1 << head)


def _attend_share(
    refs: tuple[Any, ...],
    share: _Share,
    tile_blocks: int,
    num_kv_heads: int,
    first_row: jax.Array | int,
    scale: float,
    wanted: jax.Array | int,
) -> jax.Array:
    """Attends with the wanted heads (a bit each); tells whether the sums are finite."""
    q_ref, k_ref, v_ref, block_ref, heads_ref, out_ref, lse_ref = refs
    task = share.task
    group, head_dim = q_ref.shape[1:]
    block_tokens = k_ref.shape[3]
    tokens = tile_blocks * block_tokens
    heads = max(MIN_HEADS, pl.next_power_of_2(group))

    shape = (head_dim, heads)
    channel = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    head = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    index = (jnp.full(shape, task), head, channel)
    q = pltriton.load(q_ref.at[index], mask=head < group, other=0.0)
    queries = cut_float32(q.astype(jnp.float32) * scale, parts=3)

    token = jnp.arange(tokens)
    tile_shape = (tokens, head_dim)
    cache_row = jnp.full(tile_shape, first_row + task // num_kv_heads)
    cache_head = jnp.full(tile_shape, task % num_kv_heads)
    token_in_block = jnp.broadcast_to((token % block_tokens)[:, None], tile_shape)
    tile_channel = jax.lax.broadcasted_iota(jnp.int32, tile_shape, 1)
    head_of_column = jax.lax.broadcasted_iota(jnp.int32, (tokens, heads), 1)

    def attend_tile(step: jax.Array, sums: tuple[Any, ...]) -> tuple[Any, ...]:
        largest, denominator, weighted = sums
        entry = share.first + step * tile_blocks + token // block_tokens
        in_share = entry < share.end
        block = pltriton.load(block_ref.at[task, entry], mask=in_share, other=0)
        chosen = pltriton.load(heads_ref.at[task, entry], mask=in_share, other=0) & wanted
        cache_index = (
            cache_row,
            cache_head,
            jnp.broadcast_to(block[:, None], tile_shape),
            token_in_block,
            tile_channel,
        )
        read = jnp.broadcast_to((chosen != 0)[:, None], tile_shape)
        k = pltriton.load(k_ref.at[cache_index], mask=read, other=0.0)
        v = pltriton.load(v_ref.at[cache_index], mask=read, other=0.0)
        scores = functools.reduce(jnp.add, [_dot(k, part) for part in queries])
        scores = jnp.where(((chosen[:, None] >> head_of_column) & 1) != 0, scores, -jnp.inf)
        new_largest = jnp.maximum(largest, jnp.max(scores, axis=0))
        finite = jnp.where(new_largest == -jnp.inf, 0.0, new_largest)
        weights = jnp.exp(scores - finite[None, :])
        decay = jnp.exp(largest - finite)
        product = functools.reduce(
            jnp.add, [_dot(v.T, part) for part in cut_float32(weights, parts=3)]
        )
        return (
            new_largest,
            # Summed over the tokens of a tile only at the end.
            denominator * decay[None, :] + weights,
            weighted * decay[None, :] + product,
        )

    start = (
        jnp.full((heads,), -jnp.inf, jnp.float32),
        jnp.zeros((tokens, heads), jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )
    steps = (share.end - share.first + tile_blocks - 1) // tile_blocks
    largest, denominator, weighted = jax.lax.fori_loop(0, steps, attend_tile, start)
    denominator = jnp.sum(denominator, axis=0)
    divisor = jnp.where(denominator == 0.0, 1.0, denominator)
    lse = jnp.where(denominator == 0.0, -jnp.inf, largest + jnp.log(divisor))
    column = jnp.arange(heads)
    pltriton.store(
        lse_ref.at[share.program, column],
        lse,
        mask=(column < group) & ((wanted >> column) & 1 != 0),
    )
    pltriton.store(
        out_ref.at[(jnp.full(shape, share.program), channel, head)],
        weighted / divisor[None, :],
        mask=(head < group) & ((wanted >> head) & 1 != 0),
    )
    known = (jnp.abs(weighted) < jnp.inf).astype(jnp.int32)
    return jnp.min(jnp.min(known, axis=0), axis=0) != 0


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jax.lax.dot(a, b, preferred_element_type=jnp.float32)
