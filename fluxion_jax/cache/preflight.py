"""Whether a cache fits, found out before anything of it is allocated.

Running out of pinned memory half-way ends in an error of the allocator that names no remedy, and
running out of real memory ends the process.
"""

from __future__ import annotations

import jax

from fluxion_jax.cache.layout import BLOCK_TOKENS, KVLayout, num_units
from fluxion_jax.env import free_bytes, pinned_limit_bytes
from fluxion_jax.errors import ConfigError

_GIB = 2**30
# What everything else of the process may want while a cache is in use.
_HEADROOM_BYTES = 256 * 2**20
# The most that arrays have taken of pinned memory at once. The pool that JAX takes it from gives
# nothing back to the system, but to the next arrays.
_most_pinned_bytes = 0


def host_bytes(layout: KVLayout, batch: int, max_tokens: int) -> int:
    """Bytes in host memory of a cache that does not exist yet.

    Args:
      layout: its layout.
      batch: rows.
      max_tokens: capacity of each of them.
    """
    blocks = layout.host_blocks(max_tokens)
    summaries = num_units(blocks) * layout.unit_summary_bytes if layout.summaries == "host" else 0
    tasks = len(layout.global_layers) * batch * layout.num_kv_heads
    return tasks * (blocks * layout.block_bytes + summaries)


def require_memory(layout: KVLayout, batch: int, max_tokens: int) -> None:
    """Raises unless the host part of a cache fits into pinned and into free memory.

    Args:
      layout: its layout.
      batch: rows.
      max_tokens: capacity of each of them.

    Raises:
      ConfigError: it does not fit; the text says what to do.
    """
    wanted = host_bytes(layout, batch, max_tokens)
    # What fits into the window asks nothing of the host, however little is left there.
    if not wanted:
        return
    cache = (
        f"a cache of {batch} x {max_tokens} tokens, {wanted / _GIB:.1f} GiB in host memory "
        f"({wanted / (batch * max_tokens) / 1024:.1f} KiB a token)"
    )
    in_pool = 0
    if jax.default_backend() == "gpu":
        limit, used = pinned_limit_bytes(), _pinned_in_use()
        in_pool = max(0, _most_pinned_bytes - used)
        if used + wanted > limit:
            enough = -(-(used + wanted) // _GIB) + 2
            raise ConfigError(
                f"expected at most {(limit - used) / _GIB:.1f} GiB of pinned memory "
                f"({limit / _GIB:.0f} GiB less {used / _GIB:.1f} GiB in use), got {cache}; set "
                f"XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB={enough} before JAX starts, or lower max_tokens"
            )
    free = free_bytes()
    if free is not None and wanted + _HEADROOM_BYTES > free + in_pool:
        free += in_pool
        fits = max(0, free - _HEADROOM_BYTES) * max_tokens // wanted
        fits = fits // BLOCK_TOKENS * BLOCK_TOKENS
        raise ConfigError(
            f"expected a cache that fits into the {free / _GIB:.1f} GiB of free memory, got "
            f"{cache}; lower max_tokens to about {fits}, use fewer rows, or free what else is held"
        )


def note_pinned() -> None:
    """Remembers, on a GPU, how large the pool of pinned memory must have become."""
    global _most_pinned_bytes
    if jax.default_backend() == "gpu":
        _most_pinned_bytes = max(_most_pinned_bytes, _pinned_in_use())


def _pinned_in_use() -> int:
    """Bytes of the arrays of this process that lie in pinned memory; others are not known."""
    return sum(
        x.nbytes
        for x in jax.live_arrays()
        if not x.is_deleted() and x.sharding.memory_kind == "pinned_host"
    )
