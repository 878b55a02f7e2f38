"""HostKV: the KV cache of a batch of sequences, its bulk in pinned host memory.

It is a pytree, so it travels through `jit`, `scan` and `while_loop`; its methods are pure and
return new objects. Because a program that updates it in place consumes its buffers, pass it through
`fluxion_jax.jit`, which donates it and pins the results.

Axes: B batch, K KV heads, P host blocks, C = 16 tokens of a block, H head size, U summary units.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import host_ops
from fluxion_jax.cache.layout import BLOCK_TOKENS, KVLayout, host_tokens, num_units
from fluxion_jax.cache.preflight import require_memory
from fluxion_jax.cache.summaries import MIN_EXPONENT
from fluxion_jax.errors import CacheFullError, ConfigError, FluxionError
from fluxion_jax.status import STATUS_FULL, STATUS_NAN, describe_status

Arrays = tuple[jax.Array, ...]
_STATIC: dict[str, Any] = {"static": True}


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
      lengths: int32 `[B]`, tokens of each sequence.
      active: bool `[B]`; other rows take no part in a step and have no work.
      status: int32 `[1]`, OR of status bits; 0 while all is well. `check` turns it into an error.
      cancel: int32 `[1]`, id of the cancel word that stops this batch's host work, 0 for none.
      home: uint32 `[2]`, address of `k[0]` when it was allocated. A program that updates the cache
        in place keeps it there; `check` tells if one did not.
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
    lengths: jax.Array
    active: jax.Array
    status: jax.Array
    cancel: jax.Array
    home: jax.Array

    @classmethod
    def allocate(cls, layout: KVLayout, batch: int, max_tokens: int) -> HostKV:
        """Allocates an empty cache.

        Args:
          layout: static description.
          batch: rows `B`, at least 1.
          max_tokens: capacity of each sequence in tokens, prompt and generation together.

        Raises:
          ConfigError: `batch` or `max_tokens` is below 1, or the cache does not fit into memory.
        """
        if batch < 1 or max_tokens < 1:
            raise ConfigError(
                f"expected batch >= 1 and max_tokens >= 1, got {batch} and {max_tokens}"
            )
        require_memory(layout, batch, max_tokens)
        return cls.allocate_with(_zeros, layout, batch, max_tokens)

    @classmethod
    def allocate_with(
        cls,
        make: Callable[[tuple[int, ...], Any, str], jax.Array],
        layout: KVLayout,
        batch: int,
        max_tokens: int,
    ) -> HostKV:
        """Like `allocate`, of arrays that `make(shape, dtype, memory_kind)` returns.

        They must be typed as memory of that kind, `"pinned_host"` or `"device"`; for benchmarks.
        """
        dtype = layout.jax_dtype
        heads, head_dim = layout.num_kv_heads, layout.head_dim
        blocks = layout.host_blocks(max_tokens)
        num_global, num_sliding = len(layout.global_layers), len(layout.sliding_layers)
        summaries_kind = "pinned_host" if layout.summaries == "host" else "device"

        def each(count: int, shape: tuple[int, ...], dtype: Any, kind: str = "device") -> Arrays:
            return tuple(make((batch, heads, *shape), dtype, kind) for _ in range(count))

        host_shape = (blocks, BLOCK_TOKENS, head_dim)
        window_shape = (layout.window_tokens, head_dim)
        sliding_shape = (min(layout.sliding_window or 0, max_tokens), head_dim)
        cache = cls(
            layout=layout,
            max_tokens=max_tokens,
            k=each(num_global, host_shape, dtype, "pinned_host"),
            v=each(num_global, host_shape, dtype, "pinned_host"),
            summaries=each(num_global, (num_units(blocks), 2, head_dim), jnp.int8, summaries_kind),
            exponents=tuple(
                jnp.full((batch, heads, head_dim), MIN_EXPONENT, jnp.int32)
                for _ in range(num_global)
            ),
            window_k=each(num_global, window_shape, dtype),
            window_v=each(num_global, window_shape, dtype),
            sliding_k=each(num_sliding, sliding_shape, dtype),
            sliding_v=each(num_sliding, sliding_shape, dtype),
            lengths=jnp.zeros((batch,), jnp.int32),
            active=jnp.ones((batch,), bool),
            status=jnp.zeros((1,), jnp.int32),
            cancel=jnp.zeros((1,), jnp.int32),
            home=jnp.zeros((2,), jnp.uint32),
        )
        for array in cache.host_arrays:
            host_ops.spread(array)
        return cache.at_home()

    @classmethod
    def from_arrays(
        cls,
        layout: KVLayout,
        k: Sequence[jax.Array | np.ndarray],
        v: Sequence[jax.Array | np.ndarray],
        lengths: Sequence[int] | np.ndarray,
        max_tokens: int,
    ) -> HostKV:
        """Builds a cache from keys and values computed elsewhere.

        Args:
          layout: static description; every layer must be global, because a sliding layer's keys
            beyond its window would be dropped in silence.
          k: per layer `[B, S, K, H]`, after RoPE, unscaled.
          v: likewise.
          lengths: int `[B]`, tokens of each row that count, at most `S`.
          max_tokens: capacity of each sequence.

        Raises:
          ConfigError: a shape does not fit the layout, or there are sliding layers.
          CacheFullError: a row is longer than `max_tokens`.
        """
        if layout.sliding_layers:
            raise ConfigError(
                "expected a layout without sliding layers, "
                f"got sliding_layers={layout.sliding_layers}; prefill such a model instead"
            )
        if len(k) != layout.num_layers or len(v) != layout.num_layers:
            raise ConfigError(
                f"expected {layout.num_layers} layers of keys and values, got {len(k)} and {len(v)}"
            )
        batch, tokens = np.shape(k[0])[:2]
        expected = (batch, tokens, layout.num_kv_heads, layout.head_dim)
        for layer, (layer_k, layer_v) in enumerate(zip(k, v, strict=True)):
            for name, array in (("k", layer_k), ("v", layer_v)):
                if np.shape(array) != expected:
                    raise ConfigError(
                        f"expected {name}[{layer}] of shape [B, S, K, H] = {expected}, "
                        f"got {np.shape(array)}"
                    )
        counts = np.asarray(lengths, np.int32)
        if counts.shape != (batch,) or (counts < 0).any() or (counts > tokens).any():
            raise ConfigError(
                f"expected {batch} lengths within [0, {tokens}], got {counts.tolist()}"
            )
        cache = cls.allocate(layout, batch, max_tokens)
        cache.require_room(counts)
        from fluxion_jax.cache.append import append_all

        return append_all(cache, tuple(map(jnp.asarray, k)), tuple(map(jnp.asarray, v)), counts)

    def save(self, path: str | Path) -> None:
        """Writes the sequences to a file that `load` reads, bit for bit, with checksums.

        The file takes the place of an older one only when it is complete: a process that dies
        while saving loses nothing, and leaves at most a file `.NAME.*.partial` to be deleted.

        Args:
          path: the file; its folder must exist.

        Raises:
          ConfigError: a program has consumed this object, or `path` is a folder.
          OSError: the file cannot be written.
        """
        from fluxion_jax.cache.saving import save

        save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> HostKV:
        """Allocates a cache of the saved layout, batch and capacity, and reads its sequences.

        Args:
          path: a file that `save` wrote.

        Raises:
          ConfigError: there is no such file.
          IntegrityError: the file is truncated, damaged, or something else.
        """
        from fluxion_jax.cache.saving import load

        return load(path)

    def require_room(self, count: np.ndarray | int) -> None:
        """Raises CacheFullError unless each active row has room for `count` more tokens."""
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
        """int32 `[B]`, tokens of each row that are selectable on the host."""
        return host_tokens(self.layout, self.lengths)  # type: ignore[no-any-return]

    def advance(self, count: jax.Array | int = 1) -> HostKV:
        """Counts `count` more tokens in each active row, unless an error is pending.

        Call it once per step, after every layer; only then do the tokens belong to the sequence.
        """
        full = (self.active & (self.lengths + count > self.max_tokens)).any()
        status = self.status | jnp.where(full, STATUS_FULL, 0)
        succeeded = self.active & (status[0] == 0)
        return self.replace(lengths=self.lengths + jnp.where(succeeded, count, 0), status=status)

    def has_room(self, count: jax.Array | int) -> jax.Array:
        """Rows that take part in a step of `count` tokens: bool `[B]`."""
        fits = self.lengths + count <= self.max_tokens
        return self.active & (self.status[0] == 0) & fits

    def note_non_finite(self, values: jax.Array, rows: jax.Array) -> HostKV:
        """Sets the NaN status bit if a row's values are not finite; call it before `advance`.

        Args:
          values: `[B, ...]`, for instance logits.
          rows: bool `[B]`, the rows that count.
        """
        finite = jnp.isfinite(values).reshape(self.batch, -1).all(axis=1)
        bad = (rows & ~finite).any()
        return self.replace(status=self.status | jnp.where(bad, STATUS_NAN, 0))

    def reset(self, rows: Sequence[int] | None = None) -> HostKV:
        """Empties rows (all by default), makes them active again and clears the status.

        The result shares its buffers with this object; use only one of the two afterwards.
        """
        chosen = jnp.asarray(np.isin(np.arange(self.batch), self._row_index(rows)))
        return self.replace(
            lengths=jnp.where(chosen, 0, self.lengths),
            active=self.active | chosen,
            exponents=tuple(
                jnp.where(chosen[:, None, None], MIN_EXPONENT, e) for e in self.exponents
            ),
            status=jnp.zeros_like(self.status),
        )

    def fork(self, rows: Sequence[int] | None = None) -> HostKV:
        """Copies rows (all by default, repeats allowed) into a new, independent cache."""
        index = self._row_index(rows)
        if not index.size:
            raise ConfigError("expected at least one row to fork, got none; name rows to copy")
        copied = jax.tree.map(
            lambda x: _take_rows(x, index), self.replace(status=None, cancel=None, home=None)
        )
        copied = copied.replace(
            status=jnp.array(self.status), cancel=jnp.zeros_like(self.cancel), home=self.home
        )
        return copied.at_home()  # type: ignore[no-any-return]

    def check(self) -> None:
        """Raises FluxionError if a step reported an error or copied the cache.

        The cache itself stays usable: nothing that it holds is lost.
        """
        status = int(self.status[0])
        if _address(self) != np.asarray(self.home).tolist():
            status |= host_ops.STATUS_NOT_IN_PLACE
        if status & STATUS_FULL:
            raise CacheFullError(
                f"{describe_status(status)}; lengths {np.asarray(self.lengths).tolist()} of "
                f"max_tokens={self.max_tokens}"
            )
        if status:
            raise FluxionError(describe_status(status))

    def clear_status(self) -> HostKV:
        """Returns this cache with the pending error acknowledged."""
        return self.replace(status=jnp.zeros_like(self.status)).at_home()

    def at_home(self) -> HostKV:
        """Returns this cache with its present place as the one where it must stay."""
        return self.replace(home=jnp.asarray(_address(self), jnp.uint32))

    def replace(self, **changes: Any) -> HostKV:
        """Returns a copy of this object with fields replaced; buffers are shared."""
        return dataclasses.replace(self, **changes)

    def adopt(self, other: HostKV) -> None:
        """Makes this object hold another's buffers, after a program consumed its own."""
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
        index = np.asarray(rows)
        if index.size and not np.issubdtype(index.dtype, np.integer):
            raise ConfigError(
                f"expected row numbers, got {index.dtype}; for a mask pass np.flatnonzero(mask)"
            )
        if ((index < 0) | (index >= self.batch)).any():
            raise ConfigError(
                f"expected rows within [0, {self.batch}), got {index.tolist()}; "
                "name rows of this cache"
            )
        return index.astype(np.int32)

    def __repr__(self) -> str:
        layout = self.layout
        sliding = f", {len(layout.sliding_layers)} sliding" if layout.sliding_layers else ""
        if isinstance(self.lengths, jax.core.Tracer):
            lengths = "traced"
        else:
            lengths = str(np.asarray(self.lengths).tolist())
        return (
            f"HostKV {len(layout.global_layers)} layers{sliding}, batch {self.batch}, "
            f"{layout.num_kv_heads} KV heads of {layout.head_dim}, {layout.dtype}\n"
            f"  lengths {lengths} of {self.max_tokens} tokens; "
            f"window {layout.sink_tokens} + {layout.recent_tokens} tokens; "
            f"summaries on the {layout.summaries}\n"
            f"  host {_mib(self.host_bytes)}: {_places(self._parts('host'))}\n"
            f"  device {_mib(self.device_bytes)}: {_places(self._parts('device'))}"
        )


def cache_shardings(cache: HostKV) -> HostKV:
    """The shardings of a cache's buffers, for `out_shardings` of a jitted function.

    Args:
      cache: a cache of arrays, tracers or `jax.ShapeDtypeStruct`s.

    Returns:
      A HostKV whose leaves are shardings on the default device, in pinned host memory for what
      lives there. `fluxion_jax.jit` applies it by itself.
    """
    on_device, on_host = memory_sharding("device"), memory_sharding("pinned_host")
    shardings = jax.tree.map(lambda _: on_device, cache)
    host = {"k": tuple(on_host for _ in cache.k), "v": tuple(on_host for _ in cache.v)}
    if cache.layout.summaries == "host":
        host["summaries"] = tuple(on_host for _ in cache.summaries)
    return shardings.replace(**host)  # type: ignore[no-any-return]


def memory_sharding(kind: str) -> jax.sharding.SingleDeviceSharding:
    """The default device's memory of a kind, `"device"` or `"pinned_host"`."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    return jax.sharding.SingleDeviceSharding(device, memory_kind=kind)


@functools.lru_cache(maxsize=64)
def _zeros_program(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
    kind = sharding.memory_kind
    space = host_ops.HOST if kind == "pinned_host" else host_ops.DEVICE
    # The result must be typed as host memory too, or the first step would compile for another type.
    return jax.jit(
        lambda: jax.device_put(jnp.zeros(shape, dtype), space),
        out_shardings=sharding,
    )


def _zeros(shape: tuple[int, ...], dtype: Any, kind: str) -> jax.Array:
    if kind == "pinned_host" and jax.default_backend() != "cpu":
        # A program's result would pass through as much memory on the device.
        return jax.device_put(np.zeros(shape, dtype), memory_sharding(kind))
    return _zeros_program(shape, dtype, memory_sharding(kind))()  # type: ignore[no-any-return]


def _take_rows(x: jax.Array, index: np.ndarray) -> jax.Array:
    """Copies rows of an array into a new one that XLA owns, in the same memory."""
    kind = x.sharding.memory_kind
    if kind == "pinned_host" and jax.default_backend() != "cpu":
        return jax.device_put(np.asarray(x)[index], x.sharding)
    # Not through NumPy here: JAX would adopt its memory, and copy it when it is donated.
    return _take_rows_program(kind)(x, index)  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=4)
def _take_rows_program(kind: str) -> Any:
    space = host_ops.HOST if kind == "pinned_host" else host_ops.DEVICE
    return jax.jit(
        lambda x, index: host_ops.retag(host_ops.retag(x, host_ops.DEVICE)[index], space),
        out_shardings=memory_sharding(kind),
    )


def _address(cache: HostKV) -> list[int]:
    """Where `k[0]` lies, as two 32-bit words, the lower one first; zeros without a host part."""
    if not cache.num_host_blocks or not cache.k:
        return [0, 0]
    address = cache.k[0].unsafe_buffer_pointer()
    return [address & 0xFFFFFFFF, address >> 32]


def _places(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {_mib(size)}" for name, size in parts.items() if size) or "nothing"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
