"""What crosses the border between the device program and the host: work, flushes, results.

Axes: B batch, N query heads, K KV heads, G = N // K, H head size, P host blocks of C = 16 tokens,
U summary units of all four granularities, M blocks written at once, W words of a bitmap.
"""

from __future__ import annotations

from typing import NamedTuple

import jax

STATUS_OK = 0
STATUS_INVALID = 1
STATUS_CANCELLED = 2
STATUS_TIMEOUT = 4
STATUS_INTERNAL = 8
STATUS_NOT_IN_PLACE = 16

# What `Collected.times` holds, in this order; csrc/operations.h says what each one is.
TIMES = ("waited", "busy", "span", "scored", "selected", "attended", "own", "covered", "scoring")


class Work(NamedTuple):
    """What the host is asked to do for one layer of one decode step.

    Attributes:
      q: float32 `[B, N, H]`, queries after RoPE, not scaled.
      q8: int8 `[B, N, H]`, queries quantised for scoring.
      granularity: int32 `[B, K]`, tokens of a unit: 16, 32, 64 or 128.
      k_units: int32 `[B, N]`, units wanted per query head.
      shared: int32 `[B, K]`, 1 where the group ranks once by the maximum of its heads.
      host_blocks: int32 `[B]`, selectable blocks; 0 for inactive rows.
      boundary: int32 `[B, K]`, the host attends to selected blocks with an id below it.
      cancel: int32 `[1]`, id of a cancel word, 0 for none.
      bitmap: uint32 `[B, N, W]`, a selection made elsewhere, or None if the host selects.
      status: int32 `[1]`, what went wrong in earlier layers; unless it is 0 the host has nothing to
        do. None for 0.
    """

    q: jax.Array
    q8: jax.Array
    granularity: jax.Array
    k_units: jax.Array
    shared: jax.Array
    host_blocks: jax.Array
    boundary: jax.Array
    cancel: jax.Array
    bitmap: jax.Array | None
    status: jax.Array | None = None


class Tick(NamedTuple):
    """What `submit` returns and `collect` needs.

    Attributes:
      slot: int32 `[2]`, the slot of the request and its generation.
      out: float32 `[B, N, H]`, memory that the host writes its share to, or None where `collect`
        has its own. Hand it on as it is, and read what `collect` returns.
      lse: float32 `[B, N]`, likewise.
    """

    slot: jax.Array
    out: jax.Array | None = None
    lse: jax.Array | None = None


class Flush(NamedTuple):
    """Blocks that leave the resident window for the host cache.

    Attributes:
      k: `[B, K, M, C, H]` in the cache's dtype.
      v: likewise.
      summaries: int8 `[B, K, M, 2, H]`, quantised under the new exponents.
      shift: int32 `[B, K, H]`, by how much the exponent of a channel grew.
      first_block: int32 `[B]`, where the first of them goes.
      num_blocks: int32 `[B]`, how many of the `M` are written, 0 to `M`.
    """

    k: jax.Array
    v: jax.Array
    summaries: jax.Array
    shift: jax.Array
    first_block: jax.Array
    num_blocks: jax.Array


class Collected(NamedTuple):
    """What comes back from the host.

    Attributes:
      k: the host cache `[B, K, P, C, H]`, the same buffer, after the flush.
      v: likewise.
      summaries: int8 `[B, K, U, 2, H]`, the same buffer, or None if kept on the device.
      out: float32 `[B, N, H]`, attention over the host's share; 0 where it is empty.
      lse: float32 `[B, N]`, natural log; `-inf` where the share is empty.
      status: int32 `[1]`, OR of the `STATUS_*` bits.
      times: float32 `[9]` in seconds, in the order of `TIMES`: `waited`, collect waited or helped;
        `busy`, threads worked (summed over threads, as are the next but one to three); `span`,
        from submit to the end of the last task; `scored`, `selected` and `attended`, which are
        parts of `busy`; `own`, submit and collect without waiting, with all that they copy and
        write; `covered`, at least one thread scored, selected or attended; `scoring`, from when the
        tasks were queued to the last score, or 0 where nothing was scored. What is none of the
        three is `span - covered + own`, with one thread `waited - covered + own`; n threads that
        run tasks were idle for `n * covered - busy` while others worked.
      blocks_read: int32 `[B, K]`, blocks whose K/V were read, each once for the whole group.
      units_scanned: int32 `[B, K]`, summaries read for scoring; 0 for a task whose heads all want
        nothing or all want everything, because nothing is ranked then.
      selection: uint32 `[B, N, W]`, the selection of tasks with host work, or None.
    """

    k: jax.Array
    v: jax.Array
    summaries: jax.Array | None
    out: jax.Array
    lse: jax.Array
    status: jax.Array
    times: jax.Array
    blocks_read: jax.Array
    units_scanned: jax.Array
    selection: jax.Array | None
