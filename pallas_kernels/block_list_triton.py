"""The table of selected blocks in one small kernel, for attention over device memory.

Built by XLA the table takes several kernels, and with those a good part of the time that attention
over blocks in device memory takes.

Axes: B batch, N query heads, K KV heads, G = N // K, T = B * K tasks (one KV head of one sequence),
P blocks, W bitmap words.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.bitmaps import WORD_BITS
from pallas_kernels.block_table import BlockTable
from pallas_kernels.compat import silence_triton_deprecation

CHUNK_WORDS = 32
"""Words that a program turns into entries; its 1024 blocks give each of 128 threads eight."""


def block_table_triton(
    bitmap: jax.Array,
    num_kv_heads: int,
    num_blocks: int,
    interpret: bool = False,
    *,
    boundary: jax.Array | None = None,
) -> BlockTable:
    """Lists the selected blocks of every task; entries after the last are undefined.

    Args:
      bitmap: uint32 `[B, N, W]`.
      num_kv_heads: K; divides N, and N // K is at most `MAX_GROUP`.
      num_blocks: P.
      interpret: run on any platform, slowly; for tests.
      boundary: int32 `[B, K]`, blocks with an id below it are left out; None for none.

    Returns:
      The table, `[T, P]`.
    """
    batch, num_heads, num_words = bitmap.shape
    tasks = batch * num_kv_heads
    bits = jax.lax.bitcast_convert_type(bitmap, jnp.int32).reshape(tasks, -1, num_words)
    silence_triton_deprecation()
    entries = jax.ShapeDtypeStruct((tasks, num_blocks), jnp.int32)
    bounds = [] if boundary is None else [boundary.astype(jnp.int32).reshape(tasks)]
    block, heads, total = pl.pallas_call(
        functools.partial(_kernel, group=num_heads // num_kv_heads, bounded=bool(bounds)),
        grid=(tasks, pl.cdiv(num_words, CHUNK_WORDS)),
        out_shape=[entries, entries, jax.ShapeDtypeStruct((tasks,), jnp.int32)],
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="list_blocks",
    )(bits, *bounds)
    return BlockTable(block, heads, total)


def _kernel(bitmap_ref: Any, *refs: Any, group: int, bounded: bool) -> None:
    *bounds, block_ref, heads_ref, total_ref = refs
    task, chunk = pl.program_id(0), pl.program_id(1)
    num_words = bitmap_ref.shape[2]
    boundary = bounds[0][task] if bounded else jnp.int32(0)

    def words(index: jax.Array) -> list[jax.Array]:
        below = jnp.clip(boundary - index * WORD_BITS, 0, WORD_BITS)
        # A shift by the full width is undefined.
        kept = jnp.where(below < WORD_BITS, jnp.int32(-1) << jnp.minimum(below, WORD_BITS - 1), 0)
        return [
            pltriton.load(bitmap_ref.at[task, g, index], mask=index < num_words, other=0) & kept
            for g in range(group)
        ]

    every = jnp.arange(pl.next_power_of_2(num_words))
    in_word = jax.lax.population_count(functools.reduce(jnp.bitwise_or, words(every)))
    before_chunk = jnp.sum(jnp.where(every < chunk * CHUNK_WORDS, in_word, 0))

    word = chunk * CHUNK_WORDS + jnp.arange(CHUNK_WORDS)
    of_heads = words(word)
    union = functools.reduce(jnp.bitwise_or, of_heads)
    in_word_of_chunk = jax.lax.population_count(union)
    before_word = before_chunk + jnp.cumsum(in_word_of_chunk) - in_word_of_chunk

    bit = jax.lax.broadcasted_iota(jnp.int32, (CHUNK_WORDS, WORD_BITS), 1)
    lower_bits = (1 << bit) - 1
    place = before_word[:, None] + jax.lax.population_count(union[:, None] & lower_bits)
    heads = functools.reduce(
        jnp.bitwise_or, [((w[:, None] >> bit) & 1) << g for g, w in enumerate(of_heads)]
    )
    entry = (jnp.full_like(place, task), place)
    pltriton.store(block_ref.at[entry], word[:, None] * WORD_BITS + bit, mask=heads != 0)
    pltriton.store(heads_ref.at[entry], heads, mask=heads != 0)

    @pl.when(chunk == 0)
    def _() -> None:
        total_ref[task] = jnp.sum(in_word)
