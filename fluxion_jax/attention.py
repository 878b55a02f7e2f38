"""One layer's decode attention: plan, select, split, run both sides at once, merge.

This is the paper's decode step (section 4, figure 5) as one function. The host's share runs between
`submit` and `collect` on the library's own threads; meanwhile the device attends to the resident
window and to its own share of the selected blocks. Every part returns an attention state
`(out, lse)`, and the parts merge exactly. Axes: B batch, N query heads, K KV heads, H head size,
W words of a bitmap over base blocks.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import host_ops
import pallas_kernels
from fluxion_jax.cache.append import make_flush, sketch_flush, with_layer, write_summaries
from fluxion_jax.cache.host_kv import HostKV, check_layer
from fluxion_jax.cache.layout import BLOCK_TOKENS, host_tokens
from fluxion_jax.cache.sketch import remember_query
from fluxion_jax.cache.stacked import first_row_in, on_layer
from fluxion_jax.cache.summaries import MIN_EXPONENT, quantise_query
from fluxion_jax.cache.window import window_mask, window_positions, write_token
from fluxion_jax.division import divide, unknown_granularity
from fluxion_jax.errors import (
    ConfigError,
    UnsupportedError,
    is_iterable,
    refused_by_name,
    require,
    require_integer,
    require_number,
)
from fluxion_jax.jitting import jit
from fluxion_jax.policy.protocol import NEWEST_TOKENS, Features, Plan, Policy, needs_sketch
from fluxion_jax.policy.scheduler import observe
from fluxion_jax.policy.split import Split
from fluxion_jax.sharded import AllHeads, on_shards
from fluxion_jax.status import STATUS_PLAN
from pallas_kernels.bitmaps import fold_last
from pallas_kernels.compat import target_platform

State = tuple[jax.Array, jax.Array]

_HOST_NAMES = ("native", "xla", "numpy")
_OVER_HOST_MEMORY = ("triton", "mosaic", "triton_mma", "wgmma")
_DEVICE_NAMES = ("xla", *_OVER_HOST_MEMORY)
# Where the arrays of LayerStats have their heads; None where they have none or are absent.
_HEAD_AXES_OF_STATS = (1, 1, 1, 1, None, 1, 1, None, None, 1, 2, None, None)
_SUMMED_TIMES = ("busy", "scored", "selected", "attended")
# The native kernels keep the heads that want a block in the bits of one word.
_MAX_GROUP = 64
# So many counts are summed within a kernel of something else.
_FEW_TASKS = 64


@dataclasses.dataclass(frozen=True)
class Execution:
    """Compile-time choices of how a step runs.

    Attributes:
      host: host operations to use: None for the best available, a name or a sequence of names out
        of `"native"`, `"xla"`, `"numpy"`.
      device: kernels for the device's share of the blocks: None, or out of `"xla"`, `"triton"`,
        `"mosaic"`, and for bfloat16 `"triton_mma"`, `"wgmma"`; on a GPU `"xla"` cannot read the
        cache. The resident window always takes the best there is.
      dense_below_tokens: sequences shorter than this read everything; 1024 because the resident
        window alone is a third of that, so that there is nothing to gain from selecting.
      measure: also attend to everything and report recall and output error of each head; costs as
        much as full attention.
      record: also bring back every step's plans, so that a generation can be replayed.

    Example:
      >>> import fluxion_jax as fx
      >>> execution = fx.Execution(host=["native", "xla"], dense_below_tokens=0)
      >>> execution.host, execution.measure
      (('native', 'xla'), False)
    """

    host: host_ops.Implementation = None
    device: pallas_kernels.Implementation = None
    dense_below_tokens: int = 1024
    measure: bool = False
    record: bool = False

    def __post_init__(self) -> None:
        for name, known in (("host", _HOST_NAMES), ("device", _DEVICE_NAMES)):
            chosen = getattr(self, name)
            if chosen is None:
                continue
            names = (chosen,) if isinstance(chosen, str) else chosen
            names = tuple(names) if is_iterable(names) else ()
            if not names or not all(isinstance(n, str) and n in known for n in names):
                raise ConfigError(
                    f"expected {name} to be None or out of {known}, got {chosen!r}; name one, or "
                    "several in the order of preference"
                )
            # A sequence must be hashable to be part of a compiled program's key.
            object.__setattr__(self, name, chosen if isinstance(chosen, str) else names)
        require_integer("dense_below_tokens", self.dense_below_tokens, least=0)
        for name in ("measure", "record"):
            require(name, getattr(self, name), bool, "say True or False")


class LayerStats(NamedTuple):
    """What one layer of one step did; counts, so that bytes are exact.

    Attributes:
      host_blocks: int32 `[B, K]`, blocks whose K/V the host read, once for a whole group.
      device_blocks: int32 `[B, K]`, likewise read by the device out of host memory.
      host_units: int32 `[B, K]`, summaries the host scored.
      device_units: int32 `[B, K]`, summaries the device scored.
      host_times_s: float32 `[9]`, in the order of `host_ops.TIMES`: `waited`, `busy`, `span`,
        `scored`, `selected`, `attended`, `own`, `covered` and `scoring`; see `host_ops.Collected`.
      granularity: int32 `[B, K]`, tokens of a unit, as planned.
      budget_tokens: int32 `[B, N]`, as planned.
      clipped: int32 `[B]`, heads that the policy wanted to give more than the host holds.
      notes: the plan's notes, or None.
      selection: uint32 `[B, N, W]`, the selected base blocks, or None.
      lse: float32 `[3, B, N]` of window, device share and host share, or None.
      recall: float32 `[B, N]`, share of the attention mass that was read, or None.
      output_error: float32 `[B, N]`, error of the output over the step's largest head output, or
        None.

    Example:
      >>> import jax.numpy as jnp
      >>> import fluxion_jax as fx
      >>> cache = fx.HostKV.allocate(fx.KVLayout(1, 2, 64, "float32"), batch=1, max_tokens=512)
      >>> q, kv = jnp.ones((1, 4, 64)), jnp.ones((1, 2, 64))
      >>> host = fx.policy.parse_split("host")
      >>> out, cache, stats = fx.decode_attention(
      ...     q, kv, kv, cache, 0, fx.full(), scale=64**-0.5, split=host
      ... )

      >>> stats.granularity.tolist(), stats.host_blocks.tolist()
      ([[128, 128]], [[0, 0]])
    """

    host_blocks: jax.Array
    device_blocks: jax.Array
    host_units: jax.Array
    device_units: jax.Array
    host_times_s: jax.Array
    granularity: jax.Array
    budget_tokens: jax.Array
    clipped: jax.Array
    notes: Any
    selection: jax.Array | None
    lse: jax.Array | None
    recall: jax.Array | None
    output_error: jax.Array | None

    def __str__(self) -> str:
        if isinstance(self.host_blocks, jax.core.Tracer):
            return f"LayerStats of {list(self.host_blocks.shape)} groups, traced"
        span = float(self.host_times_s[..., host_ops.TIMES.index("span")].sum())
        return (
            f"LayerStats of {list(self.host_blocks.shape)} groups: blocks read by the host "
            f"{int(self.host_blocks.sum())}, by the device {int(self.device_blocks.sum())}; "
            f"summaries scored {int(self.host_units.sum())} and {int(self.device_units.sum())}; "
            f"heads clipped {int(self.clipped.sum())}; host {span * 1e3:.3g} ms"
        )


@refused_by_name()
def decode_attention(
    q: jax.Array,
    k_new: jax.Array,
    v_new: jax.Array,
    cache: HostKV,
    layer: int | jax.Array,
    policy: Policy,
    *,
    scale: float,
    split: Split,
    execution: Execution | None = None,
    return_selection: bool = False,
) -> tuple[jax.Array, HostKV, LayerStats]:
    """Attention of one new token per sequence over its whole past, as the policy allows.

    Args:
      q: `[B, N, H]`, any float dtype, after RoPE, not scaled.
      k_new: `[B, K, H]`, the new token's keys after RoPE.
      v_new: `[B, K, H]`.
      cache: the cache before the new token. Consumed when called outside of a compiled function.
      layer: index of the layer in the model; must be a global one. With a stacked cache it may be
        an int32 scalar, for instance of a `scan` over layers.
      policy: what each head may read; see `fluxion_jax.policy`.
      scale: factor on the scores, usually `H ** -0.5`.
      split: which part of the work the host does.
      execution: how the step runs; None for the defaults.
      return_selection: also return what was selected and the log-sum-exp of each part.

    Returns:
      `(out, cache, stats)`: out `[B, N, H]` in q's dtype; the cache with this layer's token in it,
      which counts once `cache.advance()` was called after the last layer.

    Raises:
      ConfigError: an argument is of another type, shapes do not fit the cache, or the policy's
        plan does not fit them.
      UnsupportedError: more than 64 query heads share a KV head, or an implementation that was
        asked for cannot be used here.

    Example:
      >>> import jax.numpy as jnp
      >>> import fluxion_jax as fx
      >>> cache = fx.HostKV.allocate(fx.KVLayout(1, 2, 64, "float32"), batch=1, max_tokens=512)
      >>> q, kv = jnp.ones((1, 4, 64)), jnp.ones((1, 2, 64))
      >>> host = fx.policy.parse_split("host")
      >>> out, cache, stats = fx.decode_attention(
      ...     q, kv, kv, cache, 0, fx.full(), scale=64**-0.5, split=host
      ... )

      >>> cache = cache.advance()  # after the last layer
      >>> out.shape, cache.lengths.tolist()
      ((1, 4, 64), [1])
    """
    execution = Execution() if execution is None else execution
    require("cache", cache, HostKV, "allocate one with HostKV.allocate")
    require("execution", execution, Execution, "make one with Execution(...)")
    require("split", split, Split, "make one with fluxion_jax.policy.parse_split")
    require("policy", policy, Policy, "make one with parse_policy")
    require_number("a scale", scale, "H ** -0.5 is usual")
    scale = float(scale)
    check_layer(layer)
    if not isinstance(layer, jax.core.Tracer):
        layer = int(layer)
    _check_shapes(q, k_new, v_new, cache)
    if not isinstance(jnp.asarray(q), jax.core.Tracer):
        return _decode_attention_compiled(
            q,
            k_new,
            v_new,
            cache,
            layer,
            policy,
            scale=scale,
            split=split,
            execution=execution,
            return_selection=return_selection,
        )
    if cache.placement is not None:
        return _decode_attention_sharded(
            q, k_new, v_new, cache, layer, policy, scale, split, execution, return_selection
        )
    if cache.stacked:

        def attend(one: HostKV) -> tuple[tuple[jax.Array, LayerStats], HostKV]:
            out, one, stats = decode_attention(
                q,
                k_new,
                v_new,
                one,
                layer,
                policy,
                scale=scale,
                split=split,
                execution=execution,
                return_selection=return_selection,
            )
            return (out, stats), one

        (out, stats), cache = on_layer(attend, cache, layer)
        return out, cache, stats
    index = cache.global_index(layer)
    dtype, q = q.dtype, q.astype(jnp.float32)
    active = cache.has_room(1)
    # Other than that, the same in all layers of a step, so that XLA plans once for all that have
    # the same plan. After an error nothing is written, and the host does nothing.
    planned = cache.active & (cache.lengths < cache.max_tokens)
    resident = window_mask(cache.layout, cache.lengths + 1, cache.host_len) & active[:, None]
    enter = _enter_window_on_gpu if target_platform() == "gpu" else _enter_window
    sketch = cache.sketch[index] if cache.sketch else None
    window_state, window_scores, window, flush, exponents = enter(
        cache, index, q, k_new, v_new, active, resident, scale,
        sketch is not None and needs_sketch(policy),
    )  # fmt: skip
    answered = window_mask(cache.layout, cache.lengths + 1, cache.host_len) & planned[:, None]
    features = Features(
        q,
        *window_state,
        layer=layer,
        num_kv_heads=k_new.shape[1],
        layout=cache.layout,
        scale=scale,
        capacity_blocks=cache.num_host_blocks,
        host_tokens=jnp.where(planned, cache.host_len, 0),
        window_k=window[0],
        window_positions=window_positions(cache.layout, cache.lengths + 1, answered),
        sketch=sketch,
        window_scores=window_scores,
    )
    plan = _plan(policy, features, cache.lengths + 1)
    if cache.num_host_blocks == 0:
        status = jnp.where(unknown_granularity(plan).any(), STATUS_PLAN, 0)
        cache = cache.replace(status=cache.status | status)
        cache = with_layer(cache, index, window_k=window[0], window_v=window[1])
        return (
            window_state[0].astype(dtype),
            cache,
            _no_host_work(plan, window_state, execution, return_selection),
        )

    work, ranked_units, plan_status = _make_work(
        q, cache, index, plan, planned, split.at_pace(cache.pace), execution
    )
    if cache.layout.summaries == "device":
        work = _select_on_device(work, ranked_units, cache, index)

    full_state, cache = _attend_everything(
        work, flush, window_state, cache, index, scale, execution
    )
    device, collected = _attend_host_cache(
        q,
        work,
        ranked_units,
        flush,
        window_state,
        cache,
        index,
        scale,
        split,
        execution,
        return_selection,
    )
    host_state = (collected.out, collected.lse)
    states = [window_state]
    states += [device.state] if split.sides != "host" else []
    states += [host_state] if split.sides != "device" else []
    finish = _finish_layer_on_gpu if target_platform() == "gpu" else _finish_layer
    out, lse, cache = finish(
        states, cache, index, collected, flush, exponents, plan_status,
        jnp.float32 if execution.measure else dtype,
    )  # fmt: skip
    cache = with_layer(
        cache, index, k=collected.k, v=collected.v, window_k=window[0], window_v=window[1]
    )
    cache = _adapt(cache, split, collected, device)
    if sketch is not None:
        sketch = remember_query(sketch, q, window_state[1], cache.lengths, active)
        cache = sketch_flush(with_layer(cache, index, sketch=sketch), index, flush)
    lse_of_parts = jnp.stack([window_state[1], device.state[1], host_state[1]])
    stats = LayerStats(
        host_blocks=collected.blocks_read,
        device_blocks=device.blocks,
        host_units=collected.units_scanned,
        device_units=device.units,
        host_times_s=collected.times,
        granularity=work.granularity,
        budget_tokens=plan.budget_tokens,
        clipped=_clipped(plan),
        notes=plan.notes,
        selection=_selection(collected, device) if return_selection else None,
        lse=lse_of_parts if return_selection else None,
        recall=_recall(lse, full_state[1]) if execution.measure else None,
        output_error=_output_error(out, full_state[0]) if execution.measure else None,
    )
    return out.astype(dtype), cache, stats


_decode_attention_compiled = jit(
    decode_attention, static_argnames=("layer", "scale", "execution", "return_selection")
)


def _decode_attention_sharded(
    q: jax.Array,
    k_new: jax.Array,
    v_new: jax.Array,
    cache: HostKV,
    layer: int | jax.Array,
    policy: Policy,
    scale: float,
    split: Split,
    execution: Execution,
    return_selection: bool,
) -> tuple[jax.Array, HostKV, LayerStats]:
    """The same on every device of a mesh, for the heads that it has."""
    placement = cache.placement
    assert placement is not None
    if execution.measure:
        raise UnsupportedError(
            "expected measure=False for a cache on several devices, got True: errors are relative "
            "to the largest output of all heads; measure with a cache on one device"
        )

    def attend(cache: HostKV, by_head: Any, others: Any) -> tuple[Any, HostKV]:
        (q, k_new, v_new), (policy, split) = by_head, others
        out, cache, stats = decode_attention(
            q,
            k_new,
            v_new,
            cache,
            layer,
            AllHeads(policy, placement.axis),
            scale=scale,
            split=split,
            execution=execution,
            return_selection=return_selection,
        )
        times = stats.host_times_s
        # Threads of all devices add up; waiting takes as long as it takes where it takes longest.
        summed = jnp.asarray([name in _SUMMED_TIMES for name in host_ops.TIMES])
        longest = jax.lax.pmax(times, placement.axis)
        times = jnp.where(summed, jax.lax.psum(times, placement.axis), longest)
        clipped = jax.lax.psum(stats.clipped, placement.axis)
        return (out, stats._replace(host_times_s=times, clipped=clipped)), cache

    axes: Any = LayerStats(*_HEAD_AXES_OF_STATS)  # type: ignore[arg-type]
    (out, stats), cache = on_shards(
        attend, cache, (q, k_new, v_new), (policy, split), head_axis=1, results=(1, axes)
    )
    return out, cache, stats


class _DeviceShare(NamedTuple):
    state: State
    bitmap: jax.Array  # uint32 [B, N, W], the whole selection of tasks with device work
    blocks: jax.Array  # int32 [B, K]
    units: jax.Array  # int32 [B, K]


def _attend_host_cache(
    q: jax.Array,
    work: host_ops.Work,
    ranked_units: jax.Array,
    flush: host_ops.Flush,
    window_state: State,
    cache: HostKV,
    index: int,
    scale: float,
    split: Split,
    execution: Execution,
    return_selection: bool,
) -> tuple[_DeviceShare, host_ops.Collected]:
    """Runs both shares, on a GPU at once, then writes the leaving block."""
    k, v, summaries = _host_arrays(cache, index)
    rows = cache.first_row
    on_device, work = work, _unless_failed(work, cache)
    if split.sides == "device":
        device = _device_share(q, on_device, ranked_units, cache, index, scale, execution)
        read = device.state[1]
        return device, _write_only(q, work, flush, read, k, v, summaries, rows, execution)

    tick = host_ops.submit(
        work,
        k,
        v,
        summaries,
        scale=scale,
        first_row=rows,
        implementation=execution.host,
    )
    # The device share, scores and all, waits for the tick, or XLA could run it before the host
    # begins.
    q, q8, slot = jax.lax.optimization_barrier((q, on_device.q8, tick.slot))
    on_device, tick = on_device._replace(q8=q8), tick._replace(slot=slot)
    if split.sides == "host":
        device = _no_device_share(q, on_device, ranked_units, k.shape[2])
    else:
        device = _device_share(q, on_device, ranked_units, cache, index, scale, execution)
    collected = host_ops.collect(
        tick,
        work,
        k,
        v,
        summaries,
        flush,
        after=(window_state[1], device.state[1]),
        scale=scale,
        return_selection=return_selection,
        first_row=rows,
        implementation=execution.host,
    )
    return device, collected


def _unless_failed(work: host_ops.Work, cache: HostKV) -> host_ops.Work:
    """The host's work, none after an error: it may have run out of time."""
    return work._replace(status=cache.status)


def _write_only(
    q: jax.Array,
    work: host_ops.Work,
    flush: host_ops.Flush,
    read: jax.Array,
    k: jax.Array,
    v: jax.Array,
    summaries: jax.Array | None,
    rows: jax.Array | None,
    execution: Execution,
) -> host_ops.Collected:
    """What collect would bring back from a host without work: the cache after the flush."""
    k, v, summaries, status = host_ops.append(
        k,
        v,
        summaries,
        flush,
        after=(read,),
        first_row=rows,
        implementation=execution.host,
    )
    nothing = jnp.zeros_like(work.boundary)
    state = _no_device_share(q, work, nothing, k.shape[2])
    return host_ops.Collected(
        k,
        v,
        summaries,
        *state.state,
        status=status,
        times=jnp.zeros((len(host_ops.TIMES),), jnp.float32),
        blocks_read=nothing,
        units_scanned=nothing,
        selection=state.bitmap,
    )


def _plan(policy: Policy, features: Features, lengths: jax.Array) -> Plan:
    """The policy's plan, its shapes checked; values are checked when the program runs."""
    plan = policy.plan(features, lengths)
    groups = (features.q.shape[0], features.num_kv_heads)
    expected = {
        "granularity": (groups, jnp.integer),
        "budget_tokens": (features.q.shape[:2], jnp.integer),
        "shared": (groups, jnp.bool_),
    }
    for name, (shape, kind) in expected.items():
        array = jnp.asarray(getattr(plan, name))
        if array.shape != shape or not jnp.issubdtype(array.dtype, kind):
            raise ConfigError(
                f"expected {name} of the policy's plan as {kind.__name__}{list(shape)}, got "
                f"{array.dtype}{list(array.shape)}; see fluxion_jax.Plan"
            )
    return plan


def _enter_window(
    cache: HostKV,
    index: int,
    q: jax.Array,
    k_new: jax.Array,
    v_new: jax.Array,
    active: jax.Array,
    resident: jax.Array,
    scale: float,
    scored: bool,
) -> tuple[State, jax.Array | None, tuple[jax.Array, jax.Array], host_ops.Flush, jax.Array]:
    """The new token enters the window and attends to it; the block it pushes out is prepared."""
    del scored
    dtype = cache.layout.jax_dtype
    k_new, v_new = k_new.astype(dtype), v_new.astype(dtype)
    flush, exponents = make_flush(
        cache, index, k_new[:, :, None], v_new[:, :, None], active.astype(jnp.int32)
    )
    window_k, window_v = (
        write_token(cache.layout, window[index], new, cache.lengths, active)
        for window, new in ((cache.window_k, k_new), (cache.window_v, v_new))
    )
    state = pallas_kernels.window_attention(q, window_k, window_v, resident, scale=scale)
    return state, None, (window_k, window_v), flush, exponents


def _enter_window_on_gpu(
    cache: HostKV,
    index: int,
    q: jax.Array,
    k_new: jax.Array,
    v_new: jax.Array,
    active: jax.Array,
    resident: jax.Array,
    scale: float,
    scored: bool,
) -> tuple[State, jax.Array | None, tuple[jax.Array, jax.Array], host_ops.Flush, jax.Array]:
    """The same in one kernel, which knows by itself what is resident and what has failed."""
    del active, resident
    layout = cache.layout
    step = pallas_kernels.window_step(
        q,
        k_new.astype(layout.jax_dtype),
        v_new.astype(layout.jax_dtype),
        cache.window_k[index],
        cache.window_v[index],
        cache.exponents[index],
        cache.lengths,
        cache.active & (cache.lengths < cache.max_tokens),
        cache.status,
        sinks=layout.sink_tokens,
        least_exponent=MIN_EXPONENT,
        scale=scale,
        newest_tokens=NEWEST_TOKENS if scored else None,
    )
    first_block = host_tokens(layout, cache.lengths) // BLOCK_TOKENS
    flush = host_ops.Flush(
        step.block_k, step.block_v, step.summaries, step.shift, first_block, step.num_blocks
    )
    window = (step.window_k, step.window_v)
    return (step.out, step.lse), step.scores, window, flush, step.exponents


def _make_work(
    q: jax.Array,
    cache: HostKV,
    index: int,
    plan: Plan,
    active: jax.Array,
    split: Split,
    execution: Execution,
) -> tuple[host_ops.Work, jax.Array, jax.Array]:
    """Turns the plan into units, and cuts every task between host and device.

    Returns:
      The work, the units of each task that have to be scored, and statuses `[B * K]` of what is
      wrong with the plan: their own, for that of the cache differs from layer to layer, and nothing
      of this one has to wait until they are one.
    """
    host_blocks = jnp.where(active, host_tokens(cache.layout, cache.lengths) // BLOCK_TOKENS, 0)
    everything = cache.lengths + 1 < execution.dense_below_tokens
    division = divide(plan, host_blocks, everything, split, cache.layout)
    # Or XLA would compute it afresh, in a kernel of its own, for each operation that takes it.
    host_blocks, division = jax.lax.optimization_barrier((host_blocks, division))
    quantise = pallas_kernels.quantise_query if target_platform() == "gpu" else quantise_query
    work = host_ops.Work(
        q=q,
        q8=quantise(q, cache.exponents[index], plan.shared),
        granularity=division.granularity,
        k_units=division.k_units,
        shared=plan.shared.astype(jnp.int32),
        host_blocks=host_blocks,
        boundary=division.boundary,
        cancel=cache.cancel,
        bitmap=None,
    )
    return work, division.ranked_units, division.status.reshape(-1)


def _select(
    work: host_ops.Work,
    summaries: jax.Array,
    ranked: jax.Array,
    first_row: jax.Array | None = None,
    implementation: pallas_kernels.Implementation = None,
) -> jax.Array:
    scores = pallas_kernels.score_units(
        work.q8,
        summaries,
        work.granularity,
        work.host_blocks,
        ranked,
        first_row=first_row,
        implementation=implementation,
    )
    return pallas_kernels.select_units(
        scores, work.granularity, work.host_blocks, work.k_units, work.shared
    )


def _select_on_device(
    work: host_ops.Work, ranked_units: jax.Array, cache: HostKV, index: int
) -> host_ops.Work:
    summaries = cache.summaries[index]
    rows = first_row_in(cache, summaries)
    return work._replace(bitmap=_select(work, summaries, ranked_units, rows))


def _host_arrays(cache: HostKV, index: int) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    on_host = cache.layout.summaries == "host"
    return cache.k[index], cache.v[index], cache.summaries[index] if on_host else None


def _device_share(
    q: jax.Array,
    work: host_ops.Work,
    ranked_units: jax.Array,
    cache: HostKV,
    index: int,
    scale: float,
    execution: Execution,
) -> _DeviceShare:
    """Selection and attention of the device's ranges, read out of host memory where they lie."""
    kernels = _kernels_over_host_memory(execution.device)
    k, v, summaries = (
        host_ops.retag(x[index], host_ops.DEVICE) for x in (cache.k, cache.v, cache.summaries)
    )
    has_work = work.boundary < work.host_blocks[:, None]

    def run() -> _DeviceShare:
        if work.bitmap is not None:
            bitmap = work.bitmap
        else:
            # Not by XLA either, whatever was asked for the blocks.
            scoring = "triton" if target_platform() == "gpu" else None
            units = jnp.where(has_work, ranked_units, 0)
            bitmap = _select(work, summaries, units, cache.first_row, scoring)
        # Where all blocks are the host's none of them is beyond the boundary.
        *state, blocks = pallas_kernels.share_attention(
            q,
            k,
            v,
            bitmap,
            work.boundary,
            scale=scale,
            first_row=cache.first_row,
            implementation=kernels,
        )
        nothing = jnp.where(has_work, 0, k.shape[2])
        bitmap = pallas_kernels.at_or_above(bitmap, nothing)
        scanned = has_work if work.bitmap is None else jnp.ones_like(has_work)
        out, lse = state
        return _DeviceShare((out, lse), bitmap, blocks, jnp.where(scanned, ranked_units, 0))

    if target_platform() == "gpu":
        # There a conditional makes the host wait for the device; kernels without work are short.
        return run()
    return jax.lax.cond(
        has_work.any(), run, lambda: _no_device_share(q, work, ranked_units, k.shape[2])
    )


def _kernels_over_host_memory(
    chosen: pallas_kernels.Implementation,
) -> pallas_kernels.Implementation:
    """Kernels that read pinned memory where it lies, out of those chosen; on a CPU any can.

    On a GPU XLA must not compute with an array that lies in host memory: it has the host compute
    with it and with all that follows, after a search that takes exponential time.
    """
    if target_platform() != "gpu":
        return chosen
    names = _OVER_HOST_MEMORY if chosen is None else chosen
    names = (names,) if isinstance(names, str) else names
    usable = tuple(name for name in names if name in _OVER_HOST_MEMORY)
    if not usable:
        raise UnsupportedError(
            f"expected device kernels out of {_OVER_HOST_MEMORY}, which read pinned host memory on "
            f"a GPU, got {chosen!r}; name one of them, or leave all work to the host with "
            "split='host'"
        )
    return usable


def _no_device_share(
    q: jax.Array, work: host_ops.Work, ranked_units: jax.Array, num_blocks: int
) -> _DeviceShare:
    batch, heads, _ = q.shape
    nothing = jnp.zeros_like(work.boundary)
    return _DeviceShare(
        (jnp.zeros_like(q), jnp.full((batch, heads), -jnp.inf, jnp.float32)),
        jnp.zeros((batch, heads, pallas_kernels.num_words(num_blocks)), jnp.uint32),
        nothing,
        nothing if work.bitmap is None else ranked_units,
    )


def _attend_everything(
    work: host_ops.Work,
    flush: host_ops.Flush,
    window_state: State,
    cache: HostKV,
    index: int,
    scale: float,
    execution: Execution,
) -> tuple[State, HostKV]:
    """Full attention of the same query, against which recall and output error are measured.

    A pair of its own that selects everything and writes nothing; the step's own pair follows it.
    """
    if not execution.measure:
        return window_state, cache
    k, v, summaries = _host_arrays(cache, index)
    work = _unless_failed(work, cache)
    everything = pallas_kernels.pack(jnp.arange(k.shape[2]) < work.host_blocks[:, None])
    work = work._replace(
        boundary=jnp.broadcast_to(work.host_blocks[:, None], work.boundary.shape),
        bitmap=jnp.broadcast_to(
            everything[:, None, :], (*work.k_units.shape, everything.shape[-1])
        ),
    )
    nothing = flush._replace(num_blocks=jnp.zeros_like(flush.num_blocks))
    rows = cache.first_row
    tick = host_ops.submit(
        work, k, v, summaries, scale=scale, first_row=rows, implementation=execution.host
    )
    rest = host_ops.collect(
        tick,
        work,
        k,
        v,
        summaries,
        nothing,
        after=(),
        scale=scale,
        first_row=rows,
        implementation=execution.host,
    )
    arrays = {"k": rest.k, "v": rest.v}
    if rest.summaries is not None:
        arrays["summaries"] = rest.summaries
    cache = with_layer(cache, index, **arrays)
    cache = cache.replace(status=cache.status | rest.status)
    return pallas_kernels.merge_states([window_state, (rest.out, rest.lse)]), cache


def _finish_layer(
    states: list[State],
    cache: HostKV,
    index: int,
    collected: host_ops.Collected,
    flush: host_ops.Flush,
    exponents: jax.Array,
    plan_status: jax.Array,
    dtype: Any,
) -> tuple[jax.Array, jax.Array, HostKV]:
    """Merges the parts; the summaries and their scales follow the block that collect wrote.

    After an error nothing was written, so the scales must stay as they are too.
    """
    out, lse = pallas_kernels.merge_states(states)
    succeeded = collected.status[0] == 0
    exponents = jnp.where(succeeded, exponents, cache.exponents[index])
    summaries = collected.summaries
    if summaries is None:
        summaries = write_summaries(cache.summaries[index], flush, collected.status)
    cache = with_layer(cache, index, summaries=summaries, exponents=exponents)
    cache = cache.replace(status=cache.status | plan_status.max() | collected.status)
    return out.astype(dtype), lse, cache


def _finish_layer_on_gpu(
    states: list[State],
    cache: HostKV,
    index: int,
    collected: host_ops.Collected,
    flush: host_ops.Flush,
    exponents: jax.Array,
    plan_status: jax.Array,
    dtype: Any,
) -> tuple[jax.Array, jax.Array, HostKV]:
    """The same in one kernel."""
    update = None
    if collected.summaries is None:
        rows = first_row_in(cache, cache.summaries[index])
        update = pallas_kernels.SummaryUpdate(cache.summaries[index], *flush[2:], rows)
    done = pallas_kernels.finish_layer(
        states,
        cache.exponents[index],
        exponents,
        collected.status,
        [cache.status, plan_status],
        update,
        dtype=jnp.dtype(dtype).name,
    )
    summaries = collected.summaries if update is None else done.summaries
    cache = with_layer(cache, index, summaries=summaries, exponents=done.exponents)
    return done.out, done.lse, cache.replace(status=done.status)


def _adapt(
    cache: HostKV, split: Split, collected: host_ops.Collected, device: _DeviceShare
) -> HostKV:
    """Corrects the cost model by what this layer took, if the split adapts."""
    if not split.adapts or split.cost is None:
        return cache
    layout = cache.layout
    host_bytes, device_bytes = (
        _sum_of_tasks(blocks).astype(jnp.float32) * layout.block_bytes
        + (_sum_of_tasks(units) * (layout.summaries == "host")).astype(jnp.float32)
        * layout.unit_summary_bytes
        for blocks, units in (
            (collected.blocks_read, collected.units_scanned),
            (device.blocks, device.units),
        )
    )
    pace = observe(cache.pace, split.cost, host_bytes, device_bytes, collected.times)
    return cache.replace(pace=jnp.where(cache.status[0] == 0, pace, cache.pace))


def _sum_of_tasks(counts: jax.Array) -> jax.Array:
    """Of few tasks within a kernel of something else: a reduction is one of its own."""
    counts = counts.reshape(-1)
    return fold_last(jnp.add, counts) if counts.size <= _FEW_TASKS else counts.sum()


def _selection(collected: host_ops.Collected, device: _DeviceShare) -> jax.Array:
    """Host and device select the same bits, so a task on both sides may take either's."""
    assert collected.selection is not None
    return collected.selection | device.bitmap


def _clipped(plan: Plan) -> jax.Array:
    if plan.clipped is None:
        return jnp.zeros(plan.granularity.shape[:1], jnp.int32)
    return plan.clipped.sum(axis=1, dtype=jnp.int32)


def _recall(lse: jax.Array, full_lse: jax.Array) -> jax.Array:
    """Share of the attention mass that was read; 1 where there is none, in inactive rows."""
    return jnp.where(jnp.isneginf(full_lse), 1.0, jnp.exp(lse - full_lse))


def _output_error(out: jax.Array, exact: jax.Array) -> jax.Array:
    """Error per head over the largest head output of the step (paper, section 3.1)."""
    largest = jnp.linalg.norm(exact, axis=-1).max(axis=-1, keepdims=True)
    return jnp.linalg.norm(out - exact, axis=-1) / jnp.where(largest > 0, largest, 1.0)


def _no_host_work(
    plan: Plan, window_state: State, execution: Execution, return_selection: bool
) -> LayerStats:
    """Stats of a program whose cache is too short to have a host part."""
    lse = window_state[1]
    batch, heads = lse.shape
    zero = jnp.zeros(plan.granularity.shape, jnp.int32)
    unknown = unknown_granularity(plan)
    empty = jnp.full_like(lse, -jnp.inf)
    return LayerStats(
        host_blocks=zero,
        device_blocks=zero,
        host_units=zero,
        device_units=zero,
        host_times_s=jnp.zeros((len(host_ops.TIMES),), jnp.float32),
        granularity=jnp.where(unknown, BLOCK_TOKENS, plan.granularity).astype(jnp.int32),
        budget_tokens=plan.budget_tokens,
        clipped=_clipped(plan),
        notes=plan.notes,
        selection=jnp.zeros((batch, heads, 0), jnp.uint32) if return_selection else None,
        lse=jnp.stack([lse, empty, empty]) if return_selection else None,
        recall=jnp.ones((batch, heads)) if execution.measure else None,
        output_error=jnp.zeros((batch, heads)) if execution.measure else None,
    )


def _check_shapes(q: jax.Array, k_new: jax.Array, v_new: jax.Array, cache: HostKV) -> None:
    layout = cache.layout
    for name, given in (("q", q), ("k_new", k_new), ("v_new", v_new)):
        if not hasattr(given, "shape") or not hasattr(given, "dtype"):
            raise ConfigError(f"expected an array as {name}, got {type(given).__name__}")
    expected = (cache.batch, layout.num_kv_heads, layout.head_dim)
    for name, array in (("k_new", k_new), ("v_new", v_new)):
        if array.shape != expected:
            raise ConfigError(f"expected {name} of shape [B, K, H] = {expected}, got {array.shape}")
    if not all(jnp.issubdtype(array.dtype, jnp.floating) for array in (q, k_new, v_new)):
        raise ConfigError(
            f"expected q, k_new and v_new of a float dtype, got {q.dtype}, {k_new.dtype} and "
            f"{v_new.dtype}; cast them"
        )
    batch, kv_heads, head_dim = expected
    if q.ndim != 3 or q.shape[0] != batch or q.shape[2] != head_dim:
        raise ConfigError(
            f"expected q of shape [B, N, H] = ({batch}, N, {head_dim}), got {q.shape}"
        )
    if q.shape[1] > _MAX_GROUP * kv_heads:
        raise UnsupportedError(
            f"expected at most {_MAX_GROUP} query heads per KV head, got {q.shape[1]} for "
            f"{kv_heads}; split the group over several KV heads with the same keys"
        )
    if q.shape[1] % kv_heads:
        raise ConfigError(
            f"expected a multiple of {kv_heads} query heads (the cache's KV heads), "
            f"got {q.shape[1]}"
        )
