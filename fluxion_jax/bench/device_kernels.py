"""The kernels that `fluxion bench device` compares, each as preparation and attention."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import block_sparse_attention
from pallas_kernels.bitmaps import nth_block
from pallas_kernels.block_table import block_table


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One way to attend to selected blocks.

    Attributes:
      prepare: bitmap uint32 `[B, N, W]`, KV heads and blocks of the cache to what `attend` takes.
      attend: q `[B, N, H]`, k and v `[B, K, P, C, H]`, what was prepared, and `scale`, to the
        output `[B, N, H]`.
      places: memory kinds of k and v that it can read.
      any_granularity_alike: the size of units makes no difference to it.
    """

    prepare: Callable[[jax.Array, int, int], Any]
    attend: Callable[..., jax.Array]
    places: tuple[str, ...] = ("pinned_host", "device")
    any_granularity_alike: bool = False


def _triton(tile_blocks: int, num_warps: int, programs: int) -> Kernel:
    from pallas_kernels.block_list_triton import block_table_triton
    from pallas_kernels.block_sparse_triton import Tiling, attend_to_table

    tiling = Tiling(tile_blocks, num_warps, programs)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, table: Any, scale: float) -> jax.Array:
        return attend_to_table(q, k, v, table, scale=scale, tiling=tiling)[0]

    return Kernel(block_table_triton, attend)


def _triton_mma(tile_tokens: int, num_warps: int, programs: int, num_stages: int) -> Kernel:
    from pallas_kernels.block_list_triton import block_table_triton
    from pallas_kernels.block_sparse_triton_mma import Tiling, attend_to_table

    tiling = Tiling(tile_tokens, num_warps, programs, num_stages)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, table: Any, scale: float) -> jax.Array:
        return attend_to_table(q, k, v, table, scale=scale, tiling=tiling)[0]

    return Kernel(block_table_triton, attend)


def _wgmma(programs: int, stages: int) -> Kernel:
    from pallas_kernels.block_list_triton import block_table_triton
    from pallas_kernels.block_sparse_wgmma import Tiling, attend_to_table

    tiling = Tiling(programs, stages)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, table: Any, scale: float) -> jax.Array:
        return attend_to_table(q, k, v, table, scale=scale, tiling=tiling)[0]

    return Kernel(block_table_triton, attend)


def _mosaic(programs: int) -> Kernel:
    from pallas_kernels.block_sparse_mosaic import TILE_TOKENS, attend_to_table

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, table: Any, scale: float) -> jax.Array:
        return attend_to_table(q, k, v, table, scale=scale, programs=programs)[0]

    return Kernel(functools.partial(block_table, tile_blocks=TILE_TOKENS // 16), attend)


def _xla() -> Kernel:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, bitmap: Any, scale: float) -> jax.Array:
        return block_sparse_attention(q, k, v, bitmap, scale=scale, implementation="xla")[0]

    return Kernel(lambda bitmap, _heads, _blocks: bitmap, attend, ("device",))


PAGES = 1024
"""Pages of a sequence for the in-tree paged attention, which needs to know."""


def _paged() -> Kernel:
    """JAX's own paged attention: one page table for all heads, over the first head's blocks."""

    def prepare(bitmap: jax.Array, _heads: int, _blocks: int) -> jax.Array:
        ids = jnp.broadcast_to(jnp.arange(PAGES, dtype=jnp.int32), (bitmap.shape[0], PAGES))
        return nth_block(bitmap[:, 0], ids)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, pages: Any, scale: float) -> jax.Array:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention
        q = (q * scale).astype(k.dtype)
        return paged_attention(q, k[0], v[0], pages, None).astype(jnp.float32)

    return Kernel(prepare, attend, ("device",), any_granularity_alike=True)


KERNELS = {
    "xla": _xla(),
    "triton": _triton(4, 4, 512),
    "mosaic": _mosaic(512),
    "triton_mma": _triton_mma(64, 4, 264, 4),
    "wgmma": _wgmma(264, 3),
    "in-tree paged": _paged(),
    "triton 8x1 512": _triton(8, 1, 512),
    "triton 4x4 1024": _triton(4, 4, 1024),
    "triton 2x4 1024": _triton(2, 4, 1024),
    "triton 4x2 1024": _triton(4, 2, 1024),
    "triton 4x1 2048": _triton(4, 1, 2048),
    "triton_mma 64x4 132 6": _triton_mma(64, 4, 132, 6),
    "triton_mma 64x4 528 4": _triton_mma(64, 4, 528, 4),
    "triton_mma 64x8 264 4": _triton_mma(64, 8, 264, 4),
    "triton_mma 128x8 132 4": _triton_mma(128, 8, 132, 4),
    "triton_mma 32x4 528 4": _triton_mma(32, 4, 528, 4),
    "wgmma 132 6": _wgmma(132, 6),
    "wgmma 264 2": _wgmma(264, 2),
    "wgmma 396 2": _wgmma(396, 2),
    "mosaic 256": _mosaic(256),
    "mosaic 1024": _mosaic(1024),
}
