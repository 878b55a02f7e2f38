"""HostKV: the KV cache of a batch of sequences, its bulk in pinned host memory.

It is a pytree, so it travels through `jit`, `scan` and `while_loop`; its methods are pure and
return new objects. Because a program that updates it in place consumes its buffers, pass it through
`fluxion_jax.jit`, which donates it and pins the results.

Axes: B batch, K KV heads, P host blocks, C = 16 tokens of a block, H head size, U summary units.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

import host_ops
from fluxion_jax.cache.layout import KVLayout, host_tokens
from fluxion_jax.cache.placement import (
    BY_HEAD,
    Placement,
    addresses,
    array_sharding,
    filled,
    take_rows,
)
from fluxion_jax.cache.placement import memory_sharding as memory_sharding
from fluxion_jax.cache.preflight import note_pinned, require_memory
from fluxion_jax.cache.sketch import Sketch, empty_sketch, forget_rows
from fluxion_jax.cache.summaries import MIN_EXPONENT
from fluxion_jax.errors import (
    CacheFullError,
    ConfigError,
    FluxionError,
    UnsupportedError,
    is_iterable,
    require,
    require_integer,
)
from fluxion_jax.status import STATUS_FULL, STATUS_NAN, describe_status

Arrays = tuple[jax.Array, ...]
_STATIC: dict[str, Any] = {"static": True}
CONSUMED = (
    "got one that a compiled program consumed; go on with the cache that the program returned"
)
"""The end of every message about buffers that are gone."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(eq=False, repr=False)
class HostKV:
    """The state of a batch: host cache, resident window, lengths.

    Attributes:
      layout: static description.
      max_tokens: capacity of a sequence, static.
      k: per global layer `[B, K, P, C, H]` in pinned host memory; keys after RoPE, unscaled.
      v: likewise.
      summaries: per global layer int8 `[B, K, U, 2, H]`, on the host or the device.
      exponents: per global layer int32 `[B, K, H]`, powers of two that scale the summaries.
      window_k: per global layer `[B, K, sinks + ring, H]`, on the device.
      window_v: likewise.
      sliding_k: per sliding-window layer `[B, K, window, H]`, on the device.
      sliding_v: likewise.
      sketch: per global layer what policies know of the host cache, on the device; empty if the
        layout wants none, or nothing ever lies on the host.
      pace: float32 `[2]`, how much faster than its cost model each side has been, log2; see
        `policy.scheduler`.
      lengths: int32 `[B]`, tokens of each sequence.
      active: bool `[B]`; other rows take no part in a step and have no work.
      status: int32 `[1]`, OR of status bits; 0 while all is well. `check` turns it into an error.
      cancel: int32 `[1]`, id of the cancel word that stops this batch's host work, 0 for none.
      home: uint32 `[2]` for each device, address of `k[0]` when it was allocated. A program that
        updates the cache in place keeps it there; `check` tells if one did not.
      placement: over which devices the KV heads are spread, static; None for one device.
      stacked: whether the arrays of all layers are one, static: then each tuple has one array, and
        its first axis is `L * B`, for loops over layers.
      first_row: int32 `[1]`, within attention of a stacked cache's layer; else None.

    Example:
      >>> import fluxion_jax as fx
      >>> layout = fx.KVLayout(num_layers=2, num_kv_heads=2, head_dim=64)
      >>> print(fx.HostKV.allocate(layout, batch=1, max_tokens=4096))
      HostKV 2 layers, batch 1, 2 KV heads of 64, bfloat16
        lengths [0] of 4096 tokens; window 64 + 256 tokens; summaries on the host
        host 4.0 MiB: keys and values 3.8 MiB, summaries 0.2 MiB
        device 0.3 MiB: window 0.3 MiB, rest 0.0 MiB
    """

    layout: KVLayout = dataclasses.field(metadata=_STATIC)
    max_tokens: int = dataclasses.field(metadata=_STATIC)
    k: Arrays
    v: Arrays
    summaries: Arrays
    exponents: Arrays
    window_k: Arrays
    window_v: Arrays
    sliding_k: Arrays
    sliding_v: Arrays
    sketch: tuple[Sketch, ...]
    pace: jax.Array
    lengths: jax.Array
    active: jax.Array
    status: jax.Array
    cancel: jax.Array
    home: jax.Array
    placement: Placement | None = dataclasses.field(default=None, metadata=_STATIC)
    stacked: bool = dataclasses.field(default=False, metadata=_STATIC)
    first_row: jax.Array | None = None

    @classmethod
    def allocate(
        cls,
        layout: KVLayout,
        batch: int,
        max_tokens: int,
        *,
        mesh: jax.sharding.Mesh | None = None,
        axis: str | None = None,
        stacked: bool = False,
    ) -> HostKV:
        """Allocates an empty cache.

        Args:
          layout: static description.
          batch: rows `B`, at least 1.
          max_tokens: capacity of each sequence in tokens, prompt and generation together.
          mesh: several devices, each of which keeps its share of the KV heads; None for one.
          axis: the axis of the mesh that shares them; None for its only one.
          stacked: one array for all layers instead of one for each, so that a compiled loop over
            layers (`lax.scan`, `nnx.scan`) can carry the cache; on one device and without a sketch.

        Returns:
          An empty cache: every row active, of length 0.

        Raises:
          ConfigError: `batch` or `max_tokens` is below 1, the KV heads are not a multiple of the
            devices that share them, or the cache does not fit into memory.
          UnsupportedError: `stacked` with a mesh or with a sketch.
        """
        require("layout", layout, KVLayout, "take that of model.config.kv_layout()")
        require_integer("batch", batch)
        require_integer("max_tokens", max_tokens)
        placement = Placement.over(mesh, axis, layout.num_kv_heads)
        if stacked and (placement is not None or layout.sketch):
            raise UnsupportedError(
                "expected a stacked cache on one device and without a sketch, got mesh "
                f"{mesh} and sketch={layout.sketch}; allocate it with stacked=False and unroll the "
                "layers"
            )
        require_memory(layout, batch, max_tokens)
        by_head = PartitionSpec(None, None if placement is None else placement.axis)

        def zeros(shape: tuple[int, ...], dtype: Any, kind: str) -> jax.Array:
            return filled(shape, 0, dtype, array_sharding(placement, by_head, kind))

        return cls.allocate_with(
            zeros, layout, batch, max_tokens, placement=placement, stacked=stacked
        )

    @classmethod
    def allocate_with(
        cls,
        make: Callable[[tuple[int, ...], Any, str], jax.Array],
        layout: KVLayout,
        batch: int,
        max_tokens: int,
        *,
        placement: Placement | None = None,
        stacked: bool = False,
    ) -> HostKV:
        """Like `allocate`, of arrays that somebody else makes; for benchmarks.

        Args:
          make: `(shape, dtype, memory_kind) -> array`, typed as memory of that kind,
            `"pinned_host"` or `"device"`.
          layout: see `allocate`.
          batch: see `allocate`.
          max_tokens: see `allocate`.
          placement: over which devices the KV heads are spread; None for one.
          stacked: see `allocate`.

        Returns:
          The cache; its keys and values are what `make` returned.
        """
        shapes = layout.array_shapes(batch, max_tokens)
        on_host = {"k", "v", *(("summaries",) if layout.summaries == "host" else ())}

        def each(name: str) -> Arrays:
            count, shape, dtype = shapes[name]
            if stacked and count:
                count, shape = 1, (count * shape[0], *shape[1:])
            if name == "exponents":
                return tuple(whole(shape, MIN_EXPONENT, dtype, by_head) for _ in range(count))
            kind = "pinned_host" if name in on_host else "device"
            return tuple(make(shape, dtype, kind) for _ in range(count))

        everywhere = PartitionSpec()
        by_head = PartitionSpec(None, None if placement is None else placement.axis)

        def whole(
            shape: tuple[int, ...], value: int, dtype: Any, spec: PartitionSpec = everywhere
        ) -> jax.Array:
            if placement is None:
                return jnp.full(shape, value, dtype)
            return filled(shape, value, dtype, array_sharding(placement, spec))

        # Policies that need a sketch look at all heads; over several devices there is none.
        sketched = layout.sketch and layout.host_blocks(max_tokens) and placement is None
        num_sketches = len(layout.global_layers) if sketched else 0
        cache = cls(
            layout=layout,
            max_tokens=max_tokens,
            placement=placement,
            stacked=stacked,
            **{name: each(name) for name in BY_HEAD},  # type: ignore[arg-type]
            sketch=tuple(
                empty_sketch(layout, batch, layout.host_blocks(max_tokens))
                for _ in range(num_sketches)
            ),
            pace=whole((2,), 0, jnp.float32),
            lengths=whole((batch,), 0, jnp.int32),
            active=whole((batch,), 1, jnp.bool_),
            status=whole((1,), 0, jnp.int32),
            cancel=whole((1,), 0, jnp.int32),
            home=jnp.zeros((2,), jnp.uint32),
        )
        for array in cache.host_arrays:
            for shard in array.addressable_shards:
                host_ops.spread(shard.data)
        note_pinned()
        return cache.at_home()

    @classmethod
    def from_arrays(
        cls,
        layout: KVLayout,
        k: Sequence[jax.Array | np.ndarray],
        v: Sequence[jax.Array | np.ndarray],
        lengths: Sequence[int] | np.ndarray,
        max_tokens: int,
        *,
        mesh: jax.sharding.Mesh | None = None,
        axis: str | None = None,
        stacked: bool = False,
    ) -> HostKV:
        """Builds a cache from keys and values computed elsewhere.

        Args:
          layout: static description; every layer must be global, because a sliding layer's keys
            beyond its window would be dropped in silence.
          k: per layer `[B, S, K, H]`, after RoPE, unscaled.
          v: likewise.
          lengths: int `[B]`, tokens of each row that count, at most `S`.
          max_tokens: capacity of each sequence.
          mesh: see `allocate`.
          axis: see `allocate`.
          stacked: see `allocate`.

        Returns:
          A cache that holds the first `lengths` tokens of every row.

        Raises:
          ConfigError: a shape does not fit the layout, or there are sliding layers.
          CacheFullError: a row is longer than `max_tokens`.
        """
        require("layout", layout, KVLayout, "take that of model.config.kv_layout()")
        if layout.sliding_layers:
            raise ConfigError(
                "expected a layout without sliding layers, "
                f"got sliding_layers={layout.sliding_layers}; prefill such a model instead"
            )
        given: tuple[Any, Any] = (k, v)
        counted = [
            len(x)
            if isinstance(x, Sequence | np.ndarray | jax.Array) and is_iterable(x)
            else type(x).__name__
            for x in given
        ]
        if counted != [layout.num_layers] * 2:
            raise ConfigError(
                f"expected {layout.num_layers} layers of keys and values, got {counted[0]} and "
                f"{counted[1]}; pass two lists, with one array a layer"
            )
        for name, array in (("k", k[0]), ("v", v[0])):
            if len(getattr(array, "shape", ())) != 4:
                found = getattr(array, "shape", type(array).__name__)
                raise ConfigError(f"expected {name}[0] of shape [B, S, K, H], got {found}")
        batch, tokens = np.shape(k[0])[:2]
        expected = (batch, tokens, layout.num_kv_heads, layout.head_dim)
        for layer, (layer_k, layer_v) in enumerate(zip(k, v, strict=True)):
            for name, array in (("k", layer_k), ("v", layer_v)):
                found = getattr(array, "shape", type(array).__name__)
                if found != expected:
                    raise ConfigError(
                        f"expected {name}[{layer}] of shape [B, S, K, H] = {expected}, got {found}"
                    )
        counts = _integers(lengths, "lengths")
        if counts.shape != (batch,) or (counts < 0).any() or (counts > tokens).any():
            raise ConfigError(
                f"expected {batch} lengths within [0, {tokens}], got {counts.tolist()}"
            )
        cache = cls.allocate(layout, batch, max_tokens, mesh=mesh, axis=axis, stacked=stacked)
        cache.require_room(counts)
        from fluxion_jax.cache.append import append_all

        arrays = (tuple(map(jnp.asarray, k)), tuple(map(jnp.asarray, v)))
        return append_all(cache, *arrays, counts.astype(np.int32))

    def save(self, path: str | Path) -> None:
        """Writes the sequences to a file that `load` reads, bit for bit, with checksums.

        The file takes the place of an older one only when it is complete: a process that dies
        while saving loses nothing, and leaves at most a file `.NAME.*.partial` to be deleted.

        Args:
          path: the file; its folder must exist.

        Raises:
          ConfigError: `path` is a folder.
          FluxionError: a program has consumed this object.
          UnsupportedError: devices of the cache belong to other processes.
          OSError: the file cannot be written.
        """
        from fluxion_jax.cache.saving import save

        save(self, path)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        mesh: jax.sharding.Mesh | None = None,
        axis: str | None = None,
    ) -> HostKV:
        """Allocates a cache of the saved layout, batch and capacity, and reads its sequences.

        Args:
          path: a file that `save` wrote, on any number of devices.
          mesh: see `allocate`.
          axis: see `allocate`.

        Returns:
          A new cache with the same sequences, bit for bit.

        Raises:
          ConfigError: there is no such file, or the mesh does not fit.
          IntegrityError: the file is truncated, damaged, or something else.
        """
        from fluxion_jax.cache.saving import load

        return load(path, mesh=mesh, axis=axis)

    def require_room(self, count: np.ndarray | int) -> None:
        """Checks that each active row has room for more tokens.

        Args:
          count: int, or int `[B]`, how many.

        Raises:
          CacheFullError: a row would grow beyond `max_tokens`.
          FluxionError: a program has consumed this object.
        """
        require_buffers(self)
        after = np.asarray(self.lengths) + np.where(np.asarray(self.active), count, 0)
        if (after > self.max_tokens).any():
            row = int(np.argmax(after))
            raise CacheFullError(
                f"expected at most max_tokens={self.max_tokens} tokens in a sequence, got "
                f"{int(after[row])} in row {row} ({int(self.lengths[row])} cached and "
                f"{int(after[row]) - int(self.lengths[row])} new); allocate a cache with a larger "
                "max_tokens or shorten the prompt"
            )

    @property
    def batch(self) -> int:
        """Rows `B`."""
        return int(self.lengths.shape[0])

    @property
    def num_host_blocks(self) -> int:
        """Capacity `P` of a sequence in host blocks."""
        return self.layout.host_blocks(self.max_tokens)

    @property
    def host_len(self) -> jax.Array:
        """int32 `[B]`, tokens of each row that are selectable on the host.

        Raises:
          FluxionError: a program has consumed this object.
        """
        require_buffers(self)
        return host_tokens(self.layout, self.lengths)  # type: ignore[no-any-return]

    def advance(self, count: jax.Array | int = 1) -> HostKV:
        """Counts more tokens in each active row, unless an error is pending.

        Call it once per step, after every layer; only then do the tokens belong to the sequence.

        Args:
          count: int, or int32 `[B]`, how many; 1 as in a decode step.

        Returns:
          The cache with new lengths, or with a status if a row would grow beyond `max_tokens`.

        Raises:
          ConfigError: `count` is not integers of a fitting shape, or one of them is negative.
          FluxionError: a program has consumed this object.
        """
        require_buffers(self)
        if not isinstance(count, jax.core.Tracer):
            given = _integers(count, "count")
            if given.shape not in ((), (self.batch,)) or (given < 0).any():
                raise ConfigError(
                    f"expected a count of tokens, or {self.batch} of them, from 0 on, got "
                    f"{given.tolist()}; a sequence only grows, see `reset`"
                )
        full = (self.active & (self.lengths + count > self.max_tokens)).any()
        status = self.status | jnp.where(full, STATUS_FULL, 0)
        succeeded = self.active & (status[0] == 0)
        return self.replace(lengths=self.lengths + jnp.where(succeeded, count, 0), status=status)

    def has_room(self, count: jax.Array | int) -> jax.Array:
        """Rows that take part in a step.

        Args:
          count: int, or int32 `[B]`, tokens of the step.

        Returns:
          bool `[B]`.

        Raises:
          FluxionError: a program has consumed this object.
        """
        require_buffers(self)
        fits = self.lengths + count <= self.max_tokens
        return self.active & (self.status[0] == 0) & fits

    def note_non_finite(self, values: jax.Array, rows: jax.Array) -> HostKV:
        """Sets the NaN status bit if a row's values are not finite; call it before `advance`.

        Args:
          values: `[B, ...]`, for instance logits.
          rows: bool `[B]`, the rows that count.

        Returns:
          The cache, with the status bit set where a value was not finite.

        Raises:
          FluxionError: a program has consumed this object.
        """
        require_buffers(self)
        finite = jnp.isfinite(values).reshape(self.batch, -1).all(axis=1)
        bad = (rows & ~finite).any()
        return self.replace(status=self.status | jnp.where(bad, STATUS_NAN, 0))

    def reset(self, rows: Sequence[int] | None = None) -> HostKV:
        """Empties rows, makes them active again and clears the status.

        Args:
          rows: indices; None for all.

        Returns:
          A cache that shares its buffers with this object; use only one of the two afterwards.

        Raises:
          ConfigError: there is no such row.
          FluxionError: a program has consumed this object.
        """
        require_buffers(self)
        chosen = jnp.asarray(np.isin(np.arange(self.batch), self._row_index(rows)))
        return self.replace(
            lengths=jnp.where(chosen, 0, self.lengths),
            active=self.active | chosen,
            exponents=tuple(
                jnp.where(jnp.tile(chosen, len(e) // self.batch)[:, None, None], MIN_EXPONENT, e)
                for e in self.exponents
            ),
            sketch=tuple(forget_rows(sketch, chosen) for sketch in self.sketch),
            status=jnp.zeros_like(self.status),
        )

    def fork(self, rows: Sequence[int] | None = None) -> HostKV:
        """Copies rows into a new, independent cache.

        Args:
          rows: indices, repeats allowed; None for all.

        Returns:
          A cache with as many rows as were named, at the same lengths.

        Raises:
          ConfigError: there is no such row, or none was named.
          UnsupportedError: devices of the cache belong to other processes.
          FluxionError: a program has consumed this object.
        """
        require_buffers(self)
        index = self._row_index(rows)
        if not index.size:
            raise ConfigError("expected at least one row to fork, got none; name rows to copy")

        def taken(x: jax.Array) -> jax.Array:
            layers = np.arange(len(x) // self.batch, dtype=np.int32)
            return take_rows(x, (layers[:, None] * self.batch + index).reshape(-1))

        copied = jax.tree.map(taken, self.replace(pace=None, status=None, cancel=None, home=None))
        copied = copied.replace(
            pace=jnp.array(self.pace),
            status=jnp.array(self.status),
            cancel=jnp.zeros_like(self.cancel),
            home=self.home,
        )
        return copied.at_home()  # type: ignore[no-any-return]

    def check(self) -> None:
        """Raises if a step reported an error or copied the cache.

        The cache itself stays usable: nothing that it holds is lost, if a chunk of a prompt was
        followed by `undo_if_failed`.

        Raises:
          CacheFullError: a row reached `max_tokens`.
          FluxionError: another error, or a program has consumed this object; the text names it and
            the remedy.
        """
        require_buffers(self)
        status = int(self.status[0])
        homes = {
            shard.device: np.asarray(shard.data).tolist() for shard in self.home.addressable_shards
        }
        places = self._addresses()
        if places and places != homes:
            status |= host_ops.STATUS_NOT_IN_PLACE
        if status & STATUS_FULL:
            raise CacheFullError(
                f"{describe_status(status)}; lengths {np.asarray(self.lengths).tolist()} of "
                f"max_tokens={self.max_tokens}"
            )
        if status:
            raise FluxionError(describe_status(status))

    def undo_if_failed(self, before: HostKV) -> HostKV:
        """This cache, or after an error one that holds what it held before a chunk of a prompt.

        A chunk overwrites resident tokens, unlike a decode step, which writes into a free slot; so
        a chunk that does not count must be undone. `generate` and `prefill` do it; a compiled
        function of one's own that prefills calls this after `advance`.

        Args:
          before: the cache as it was before the chunk's first layer.

        Returns:
          A cache with the lengths and the status of this one. After an error bounds in it may be
          looser than they could be, never wrong.
        """
        failed = self.status[0] != 0
        names = ("window_k", "window_v", "sliding_k", "sliding_v", "sketch")
        return self.replace(
            **{
                name: jax.tree.map(
                    lambda old, new: jnp.where(failed, old, new),
                    getattr(before, name),
                    getattr(self, name),
                )
                for name in names
            }
        )

    def clear_status(self) -> HostKV:
        """Returns this cache with the pending error acknowledged.

        Raises:
          FluxionError: a program has consumed this object.
        """
        require_buffers(self)
        return self.replace(status=jnp.zeros_like(self.status)).at_home()

    def at_home(self) -> HostKV:
        """Returns this cache with its present place as the one where it must stay.

        Raises:
          FluxionError: a program has consumed this object.
        """
        require_buffers(self)
        places = self._addresses()
        if self.placement is None:
            words = next(iter(places.values()), [0, 0])
            return self.replace(home=jnp.asarray(words, jnp.uint32))
        sharding = array_sharding(self.placement, PartitionSpec(self.placement.axis))
        parts = [
            jax.device_put(np.asarray(places.get(device, [0, 0]), np.uint32), device)
            for device in sharding.addressable_devices
        ]
        shape = (2 * self.placement.size,)
        home = jax.make_array_from_single_device_arrays(shape, sharding, parts)
        return self.replace(home=home)

    def replace(self, **changes: Any) -> HostKV:
        """Returns a copy of this object with fields replaced; buffers are shared.

        Args:
          **changes: new values by the name of the field.

        Returns:
          The copy.
        """
        return dataclasses.replace(self, **changes)

    def adopt(self, other: HostKV) -> None:
        """Makes this object hold another's buffers, after a program consumed its own.

        Args:
          other: the cache that the program returned.
        """
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(other, field.name))

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory."""
        return sum(x.nbytes for x in self.host_arrays)

    @property
    def host_arrays(self) -> Arrays:
        """What lies in host memory: keys, values, and summaries if they are kept there."""
        on_host = self.layout.summaries == "host"
        return (*self.k, *self.v, *(self.summaries if on_host else ()))

    @property
    def device_bytes(self) -> int:
        """Bytes in device memory."""
        return sum(x.nbytes for x in jax.tree.leaves(self)) - self.host_bytes

    def global_index(self, layer: int | jax.Array) -> int:
        """Position of a global layer's arrays in the tuples of this cache.

        Args:
          layer: index of the layer in the model.

        Returns:
          A Python int.

        Raises:
          ConfigError: there is no such layer, or a compiled loop chooses it and the cache is not
            stacked.
        """
        return self._index(layer, self.layout.global_index)

    def sliding_index(self, layer: int | jax.Array) -> int:
        """Position of a sliding-window layer's arrays in the tuples of this cache.

        Args:
          layer: index of the layer in the model.

        Returns:
          A Python int.

        Raises:
          ConfigError: see `global_index`.
        """
        return self._index(layer, self.layout.sliding_index)

    def _index(self, layer: int | jax.Array, find: Callable[[int], int]) -> int:
        if self.first_row is not None:
            return 0
        if isinstance(layer, jax.core.Tracer):
            raise ConfigError(
                "expected a Python int as the layer of a cache with arrays for each layer, got a "
                f"traced {layer.dtype}; for a loop over layers allocate it with stacked=True"
            )
        check_layer(layer)
        return find(int(layer))

    def _addresses(self) -> dict[Any, list[int]]:
        return addresses(self.k[0] if self.num_host_blocks and self.k else None)

    def _parts(self, place: str) -> dict[str, int]:
        """Bytes in a place by what they are for."""
        summaries = sum(x.nbytes for x in self.summaries)
        parts = {"summaries": summaries if self.layout.summaries == place else 0}
        if place == "host":
            return {"keys and values": self.host_bytes - parts["summaries"], **parts}
        parts["window"] = sum(x.nbytes for x in (*self.window_k, *self.window_v))
        parts["sliding layers"] = sum(x.nbytes for x in (*self.sliding_k, *self.sliding_v))
        parts["rest"] = self.device_bytes - sum(parts.values())
        return parts

    def _row_index(self, rows: Sequence[int] | np.ndarray | None) -> np.ndarray:
        """Row numbers, int32; all of them for None."""
        if rows is None:
            return np.arange(self.batch, dtype=np.int32)
        index = _integers(rows, "row numbers; for a mask pass np.flatnonzero(mask)")
        if ((index < 0) | (index >= self.batch)).any():
            raise ConfigError(
                f"expected rows within [0, {self.batch}), got {index.tolist()}; "
                "name rows of this cache"
            )
        return index.astype(np.int32)

    def __repr__(self) -> str:
        layout = self.layout
        sliding = f", {len(layout.sliding_layers)} sliding" if layout.sliding_layers else ""
        stacked = ", stacked" if self.stacked else ""
        if not hasattr(self.lengths, "shape"):
            return f"HostKV of {_leaf_kinds(self)}"
        if _is_consumed(self):
            return "HostKV that a program has consumed; go on with the one that it returned"
        if isinstance(self.lengths, jax.core.Tracer):
            lengths = "traced"
        else:
            lengths = str(np.asarray(self.lengths).tolist())
        return (
            f"HostKV {len(layout.global_layers)} layers{sliding}{stacked}, batch {self.batch}, "
            f"{layout.num_kv_heads} KV heads of {layout.head_dim}, {layout.dtype}\n"
            f"  lengths {lengths} of {self.max_tokens} tokens; "
            f"window {layout.sink_tokens} + {layout.recent_tokens} tokens; "
            f"summaries on the {layout.summaries}\n"
            f"  host {_mib(self.host_bytes)}: {_places(self._parts('host'))}\n"
            f"  device {_mib(self.device_bytes)}: {_places(self._parts('device'))}"
        )


def require_buffers(cache: HostKV) -> None:
    """Raises FluxionError if a program has consumed a cache; a traced one has none to lose."""
    if not isinstance(cache.lengths, jax.core.Tracer) and _is_consumed(cache):
        raise FluxionError(f"expected a cache with its buffers, {CONSUMED}")


def _is_consumed(cache: HostKV) -> bool:
    return any(getattr(x, "is_deleted", bool)() for x in jax.tree.leaves(cache))


def cache_shardings(cache: HostKV) -> HostKV:
    """The shardings of a cache's buffers, for `out_shardings` of a jitted function.

    Args:
      cache: a cache of arrays, of tracers or of objects like `jax.ShapeDtypeStruct`.

    Returns:
      A HostKV whose leaves are shardings on the cache's devices, in pinned host memory for what
      lives there. `fluxion_jax.jit` applies it by itself.

    Example:
      >>> import fluxion_jax as fx
      >>> cache = fx.HostKV.allocate(fx.KVLayout(1, 2, 64), batch=1, max_tokens=512)
      >>> fx.cache_shardings(cache).k[0].memory_kind
      'pinned_host'
    """
    require("cache", cache, HostKV, "allocate one with HostKV.allocate")
    placement = cache.placement
    if placement is None:
        spec: Any = jax.tree.map(lambda _: PartitionSpec(), cache)
    else:
        spec = placement.specs(cache)
    shardings = jax.tree.map(lambda s: array_sharding(placement, s), spec)
    pinned = BY_HEAD[: 3 if cache.layout.summaries == "host" else 2]
    for name in pinned:
        on_host = [array_sharding(placement, s, "pinned_host") for s in getattr(spec, name)]
        shardings = shardings.replace(**{name: tuple(on_host)})
    return shardings  # type: ignore[no-any-return]


def _leaf_kinds(tree: Any) -> str:
    """What a pytree holds that are no arrays, such as shardings."""
    kinds = Counter(
        type(x).__name__ + (f" in {x.memory_kind}" if hasattr(x, "memory_kind") else "")
        for x in jax.tree.leaves(tree)
    )
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def _places(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {_mib(size)}" for name, size in parts.items() if size) or "nothing"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


def check_layer(layer: Any) -> None:
    """Raises ConfigError unless a value is one integer, which a program may choose."""
    if not isinstance(layer, jax.core.Tracer) and _integers(layer, "the layer").shape != ():
        raise ConfigError(
            f"expected the index of a layer as layer, got {layer!r}; pass one integer"
        )


def _integers(values: Any, what: str) -> np.ndarray:
    """An array of integers that a caller gave, which must fit into int32; nothing is rounded."""
    try:
        found = np.asarray(values)
    except (TypeError, ValueError):
        found = np.asarray(None)
    if found.size and not np.issubdtype(found.dtype, np.integer):
        raise ConfigError(f"expected integers as {what}, got {values!r}")
    if (np.abs(found.astype(np.float64)) > np.iinfo(np.int32).max).any():
        raise ConfigError(f"expected integers below 2**31 as {what}, got {values!r}")
    return found
