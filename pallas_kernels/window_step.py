"""What a decode step does with the resident window, in one kernel.

One new token per sequence enters the window, its query attends to the window, and the block that
the token pushes out is taken out and summarised. XLA needs about seventeen kernels for it, each of
which takes longer to start than to run.

Axes: B batch, N query heads, K KV heads, G = N // K, S window slots (sinks, then a ring of R), C
tokens of a block, H head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.compat import silence_triton_deprecation
from pallas_kernels.registry import require_gpu, traced_once
from pallas_kernels.scoring import BLOCK_TOKENS

TILE_SLOTS = 128
"""Slots of a tile."""

_NUM_WARPS = 16
# The tiles of one loop step are read all at once, into registers: a window of usual size is one.
_STEP_BYTES = 96 * 1024
_INT8_MAX = 127
# 127 = 1.984375 * 2**6: fraction bits of float32 above which the next power of two is needed.
_FRACTION_OF_127 = 0x7E0000


class WindowStep(NamedTuple):
    """What comes out of a step.

    Attributes:
      out: float32 `[B, N, H]`, attention to the window with the new token in it.
      lse: float32 `[B, N]`; `-inf` for rows that take no part.
      window_k: `[B, K, S, H]`, in place if the program donates it.
      window_v: likewise.
      block_k: `[B, K, 1, C, H]`, the oldest block of the window's ring.
      block_v: likewise.
      summaries: int8 `[B, K, 1, 2, H]`, the block's least and largest keys under the new exponents.
      exponents: int32 `[B, K, H]`, grown to what the block needs if it leaves.
      shift: int32 `[B, K, H]`, by how much they grew.
      num_blocks: int32 `[B]`, 1 where the block leaves the window, else 0.
      scores: float32 `[B, N, 3]`, as `window_scores` gives them for the new token's window; `-inf`
        for rows that take no part. None unless the newest tokens are counted.
    """

    out: jax.Array
    lse: jax.Array
    window_k: jax.Array
    window_v: jax.Array
    block_k: jax.Array
    block_v: jax.Array
    summaries: jax.Array
    exponents: jax.Array
    shift: jax.Array
    num_blocks: jax.Array
    scores: jax.Array | None


@functools.partial(
    traced_once, constants=["sinks", "least_exponent", "scale", "newest_tokens", "interpret"]
)
def window_step(
    q: jax.Array,
    k_new: jax.Array,
    v_new: jax.Array,
    window_k: jax.Array,
    window_v: jax.Array,
    exponents: jax.Array,
    lengths: jax.Array,
    active: jax.Array,
    status: jax.Array,
    *,
    sinks: int,
    least_exponent: int,
    scale: float,
    newest_tokens: int | None = None,
    interpret: bool = False,
) -> WindowStep:
    """Takes a token into the window, attends to it, and prepares the block that leaves.

    Args:
      q: float32 `[B, N, H]`, not scaled.
      k_new: `[B, K, H]`, in the window's dtype.
      v_new: likewise.
      window_k: bfloat16, float16 or float32 `[B, K, S, H]`; the token with position `p` lies in
        slot `p` if that is below `sinks`, else in slot `sinks + (p - sinks) mod R`.
      window_v: likewise.
      exponents: int32 `[B, K, H]`, powers of two that scale the summaries, `least_exponent` to 126.
      lengths: int32 `[B]`, tokens before this one.
      active: bool `[B]`; other rows stay as they are.
      status: int32 `[1]`; unless it is 0 all rows stay as they are.
      sinks: first slots, that never leave.
      least_exponent: of a channel whose keys are all zero.
      scale: multiplies `q . k`.
      newest_tokens: so many, the new one among them, are the newest of the scores; None leaves the
        scores out.
      interpret: run on any platform, slowly; for tests.

    Raises:
      UnsupportedImplementationError: not on a GPU.
    """
    require_gpu(interpret, advice="use XLA's operations")
    batch, num_heads, head_dim = q.shape
    kv_heads, slots = window_k.shape[1:3]
    tasks, group = batch * kv_heads, num_heads // kv_heads
    dtype = window_k.dtype

    def whole_task(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda task, _: (task,) + (0,) * len(shape))

    row = pl.BlockSpec((1,), lambda task, _: (task // kv_heads,))
    once = pl.BlockSpec((1,), lambda task, _: (0,))
    channels, window = whole_task(head_dim), whole_task(slots, head_dim)
    block = whole_task(BLOCK_TOKENS, head_dim)

    def head_of(program: jax.Array) -> jax.Array:
        # The last program of a task has no head.
        return jnp.minimum(program, group - 1)

    of_head = pl.BlockSpec((None, None, head_dim), lambda task, i: (task, head_of(i), 0))
    window_shape = jax.ShapeDtypeStruct((tasks, slots, head_dim), dtype)
    block_shape = jax.ShapeDtypeStruct((tasks, BLOCK_TOKENS, head_dim), dtype)
    per_channel = jax.ShapeDtypeStruct((tasks, head_dim), jnp.int32)
    scored = newest_tokens is not None
    silence_triton_deprecation()
    found = pl.pallas_call(
        functools.partial(
            _kernel,
            group=group,
            sinks=sinks,
            least_exponent=least_exponent,
            scale=scale,
            newest_tokens=newest_tokens,
        ),
        grid=(tasks, group + 1),
        in_specs=[of_head, channels, channels, window, window, channels, row, row, once],
        out_specs=[
            of_head,
            pl.BlockSpec((None, 1), lambda task, i: (task, head_of(i))),
            *[window] * 2,
            *[block] * 2,
            whole_task(2, head_dim),
            *[channels] * 2,
            row,
            *[pl.BlockSpec((None, None, 3), lambda task, i: (task, head_of(i), 0))] * scored,
        ],
        out_shape=[
            jax.ShapeDtypeStruct((tasks, group, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((tasks, group), jnp.float32),
            *[window_shape] * 2,
            *[block_shape] * 2,
            jax.ShapeDtypeStruct((tasks, 2, head_dim), jnp.int8),
            *[per_channel] * 2,
            jax.ShapeDtypeStruct((batch,), jnp.int32),
            *[jax.ShapeDtypeStruct((tasks, group, 3), jnp.float32)] * scored,
        ],
        input_output_aliases={3: 2, 4: 3},
        compiler_params=pltriton.CompilerParams(num_warps=_NUM_WARPS, num_stages=1),
        interpret=interpret,
        name="window_step",
    )(
        q.astype(jnp.float32).reshape(tasks, group, head_dim),
        k_new.reshape(tasks, head_dim),
        v_new.reshape(tasks, head_dim),
        window_k.reshape(tasks, slots, head_dim),
        window_v.reshape(tasks, slots, head_dim),
        exponents.reshape(tasks, head_dim),
        lengths.astype(jnp.int32),
        active.astype(jnp.int32),
        status,
    )
    out, lse, window_k, window_v, block_k, block_v, summaries, grown, shift, num_blocks = found[:10]
    heads = (batch, kv_heads)
    return WindowStep(
        out.reshape(q.shape),
        lse.reshape(batch, num_heads),
        window_k.reshape(*heads, slots, head_dim),
        window_v.reshape(*heads, slots, head_dim),
        block_k.reshape(*heads, 1, BLOCK_TOKENS, head_dim),
        block_v.reshape(*heads, 1, BLOCK_TOKENS, head_dim),
        summaries.reshape(*heads, 1, 2, head_dim),
        grown.reshape(*heads, head_dim),
        shift.reshape(*heads, head_dim),
        num_blocks,
        found[10].reshape(batch, num_heads, 3) if scored else None,
    )


def _kernel(
    q_ref: Any,
    k_new_ref: Any,
    v_new_ref: Any,
    _old_k_ref: Any,
    _old_v_ref: Any,
    exponents_ref: Any,
    lengths_ref: Any,
    active_ref: Any,
    status_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    k_ref: Any,
    v_ref: Any,
    block_k_ref: Any,
    block_v_ref: Any,
    summaries_ref: Any,
    grown_ref: Any,
    shift_ref: Any,
    num_blocks_ref: Any,
    *scores_ref: Any,
    group: int,
    sinks: int,
    least_exponent: int,
    scale: float,
    newest_tokens: int | None,
) -> None:
    """A query head's attention; a task's last program writes what belongs to the whole group.

    Neither waits for the other: what one writes, the other never reads.
    """
    slots, head_dim = k_ref.shape
    ring = slots - sinks
    channel = jnp.arange(pl.next_power_of_2(head_dim), dtype=jnp.int32)
    in_head = channel < head_dim
    length = lengths_ref[0]
    # A scalar `where` of constants would be taken for one of booleans.
    active = active_ref[0] * (1 - jnp.clip(status_ref[0], 0, 1))
    first = _on_host(length, sinks, ring)
    num_blocks = jax.lax.div(_on_host(length + active, sinks, ring) - first, BLOCK_TOKENS)
    newest = jax.lax.rem(jnp.maximum(length - sinks, 0), ring)
    new_slot = jnp.where(length < sinks, length, sinks + newest)

    def load(ref: Any, new: jax.Array, slot: jax.Array, wanted: jax.Array) -> jax.Array:
        """Rows of the window; the new token's is never read where it is written."""
        shape = (slot.size, channel.size)
        is_new = slot == new_slot
        index = (
            jnp.broadcast_to(slot[:, None], shape),
            jnp.broadcast_to(channel[None, :], shape),
        )
        mask = jnp.broadcast_to((wanted & ~is_new)[:, None] & in_head[None, :], shape)
        rows = pltriton.load(ref.at[index], mask=mask, other=0)
        entered = jnp.broadcast_to((wanted & is_new)[:, None], shape)
        return jnp.where(entered, jnp.broadcast_to(new[None, :], shape), rows)

    def behind(slot: jax.Array) -> jax.Array:
        """How many tokens the newest one of a ring's slot is behind the one that enters."""
        distance = newest - (slot - sinks)
        return jnp.where(distance < 0, distance + ring, distance)

    def resident(slot: jax.Array) -> jax.Array:
        distance = behind(slot)
        stream = length - sinks - distance
        recent = (slot >= sinks) & (slot < slots) & (stream >= first) & (stream >= 0)
        return (((slot < sinks) & (slot <= length)) | recent) & (active > 0)

    def is_sink(slot: jax.Array) -> jax.Array:
        return slot < sinks

    def is_newest(slot: jax.Array) -> jax.Array:
        # A sink is among them while the sequence is short.
        position = jnp.where(is_sink(slot), slot, length - behind(slot))
        return position > length - newest_tokens

    parts = (is_sink, is_newest) if scores_ref else ()
    tile_bytes = TILE_SLOTS * channel.size * k_ref.dtype.itemsize
    tiles = max(1, min(pl.cdiv(slots, TILE_SLOTS), _STEP_BYTES // tile_bytes))

    @pl.when(pl.program_id(1) < group)
    def _() -> None:
        q = pltriton.load(q_ref.at[channel], mask=in_head, other=0.0) * scale
        k_new, v_new = (
            pltriton.load(ref.at[channel], mask=in_head, other=0) for ref in (k_new_ref, v_new_ref)
        )

        def attend(step: jax.Array, sums: tuple[Any, ...]) -> tuple[Any, ...]:
            largest, total, weighted, of_parts = sums
            start = step * (tiles * TILE_SLOTS)
            slot = [
                start + tile * TILE_SLOTS + jnp.arange(TILE_SLOTS, dtype=jnp.int32)
                for tile in range(tiles)
            ]
            wanted = [resident(x) for x in slot]
            keys = [load(k_ref, k_new, *x) for x in zip(slot, wanted, strict=True)]
            values = [load(v_ref, v_new, *x) for x in zip(slot, wanted, strict=True)]
            scores = [
                jnp.where(here, jnp.sum(k.astype(jnp.float32) * q[None, :], axis=1), -jnp.inf)
                for here, k in zip(wanted, keys, strict=True)
            ]
            new_largest, weights, decay = _weigh(scores, largest)
            terms = [
                weight[:, None] * v.astype(jnp.float32)
                for weight, v in zip(weights, values, strict=True)
            ]

            def among(part: Callable[[jax.Array], jax.Array]) -> list[jax.Array]:
                return [
                    jnp.where(part(x), score, -jnp.inf)
                    for x, score in zip(slot, scores, strict=True)
                ]

            return (
                new_largest,
                total * decay + jnp.sum(functools.reduce(jnp.add, weights)),
                weighted * decay + jnp.sum(functools.reduce(jnp.add, terms), axis=0),
                tuple(
                    _add(among(part), *so_far) for part, so_far in zip(parts, of_parts, strict=True)
                ),
            )

        nothing = (jnp.float32(-jnp.inf), jnp.float32(0.0))
        start = (*nothing, jnp.zeros(channel.shape, jnp.float32), (nothing,) * len(parts))
        steps = pl.cdiv(slots, tiles * TILE_SLOTS)
        largest, total, weighted, of_parts = jax.lax.fori_loop(0, steps, attend, start)
        divisor = jnp.where(total == 0.0, 1.0, total)
        pltriton.store(out_ref.at[channel], weighted / divisor, mask=in_head)
        lse_ref[0] = jnp.where(total == 0.0, -jnp.inf, largest + jnp.log(divisor))
        # Both terms are -inf of a part without tokens.
        found = (largest, *(most + jnp.log(of_part) for most, of_part in of_parts))
        for ref in scores_ref:
            for i, score in enumerate(found):
                ref[i] = score

    @pl.when(pl.program_id(1) == group)
    def _() -> None:
        num_blocks_ref[0] = num_blocks
        token = jnp.arange(BLOCK_TOKENS, dtype=jnp.int32)
        slot = sinks + jax.lax.rem(first + token, ring)
        shape = (BLOCK_TOKENS, channel.size)
        index = (
            jnp.broadcast_to(token[:, None], shape),
            jnp.broadcast_to(channel[None, :], shape),
        )
        mask = jnp.broadcast_to(in_head[None, :], shape)
        # A token that leaves is older than the one that enters, by all recent ones.
        at = (jnp.broadcast_to(slot[:, None], shape), index[1])
        for ref, block_ref in ((k_ref, block_k_ref), (v_ref, block_v_ref)):
            rows = pltriton.load(ref.at[at], mask=mask, other=0)
            pltriton.store(block_ref.at[index], rows, mask=mask)
        keys = pltriton.load(k_ref.at[at], mask=mask, other=0).astype(jnp.float32)

        old = pltriton.load(exponents_ref.at[channel], mask=in_head, other=least_exponent)
        finite = jnp.abs(keys) < jnp.inf
        known = jnp.where(finite, keys, 0.0)
        largest = jnp.max(jnp.abs(known), axis=0)
        needed = jnp.maximum(_exponent(largest), least_exponent)
        grown = jnp.where(num_blocks > 0, jnp.maximum(old, needed), old)
        scaled = known * _power_of_two(-grown)[None, :]
        low = jnp.where(finite, jnp.floor(scaled), -_INT8_MAX)
        high = jnp.where(finite, jnp.ceil(scaled), _INT8_MAX)
        bounds = (jnp.min(low, axis=0), jnp.max(high, axis=0))
        for half, bound in enumerate(bounds):
            bound = jnp.minimum(jnp.maximum(bound, -_INT8_MAX), _INT8_MAX)
            pltriton.store(
                summaries_ref.at[half, channel],
                bound.astype(jnp.int32).astype(jnp.int8),
                mask=in_head,
            )
        pltriton.store(grown_ref.at[channel], grown, mask=in_head)
        pltriton.store(shift_ref.at[channel], grown - old, mask=in_head)

        entering = in_head & (active > 0)
        for ref, new_ref in ((k_ref, k_new_ref), (v_ref, v_new_ref)):
            new = pltriton.load(new_ref.at[channel], mask=in_head, other=0)
            pltriton.store(ref.at[new_slot, channel], new, mask=entering)


def _weigh(
    scores: Sequence[jax.Array], largest: jax.Array
) -> tuple[jax.Array, list[jax.Array], jax.Array]:
    """The largest score so far, weights relative to it, and the factor on earlier sums."""
    new_largest = jnp.maximum(largest, jnp.max(functools.reduce(jnp.maximum, scores)))
    finite = jnp.where(new_largest == -jnp.inf, 0.0, new_largest)
    weights = [jnp.exp(score - finite) for score in scores]
    return new_largest, weights, jnp.exp(largest - finite)


def _add(
    scores: Sequence[jax.Array], largest: jax.Array, total: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A part's largest score and sum of weights: its own, for it may lie far below the others."""
    largest, weights, decay = _weigh(scores, largest)
    return largest, total * decay + jnp.sum(functools.reduce(jnp.add, weights))


def _on_host(length: jax.Array, sinks: int, ring: int) -> jax.Array:
    """Stream tokens that have left the window of a sequence of this length."""
    recent = ring - BLOCK_TOKENS
    return jax.lax.div(jnp.maximum(length - sinks - recent, 0), BLOCK_TOKENS) * BLOCK_TOKENS


def _exponent(largest: jax.Array) -> jax.Array:
    """The least `e` with `largest <= 127 * 2**e` for normal floats; below -126 for others."""
    bits = jax.lax.bitcast_convert_type(largest, jnp.int32)
    return (bits >> 23) - 133 + jnp.where((bits & 0x7FFFFF) > _FRACTION_OF_127, 1, 0)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
