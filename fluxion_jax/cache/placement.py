"""Where the arrays of a cache lie: on one device, or by KV heads over several.

With several devices every array that has a KV-head axis is cut along it, so each device keeps the
heads it computes, in its own memory and its own part of host memory; what describes sequences
(lengths, status) is the same everywhere. Axes: B batch, K KV heads.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import host_ops
from fluxion_jax.errors import ConfigError, UnsupportedError, require

if TYPE_CHECKING:
    from fluxion_jax.cache.host_kv import HostKV

BY_HEAD = ("k", "v", "summaries", "exponents", "window_k", "window_v", "sliding_k", "sliding_v")


@dataclasses.dataclass(frozen=True)
class Placement:
    """KV heads over one axis of a mesh; hashable, so it is part of a compiled program's key.

    Attributes:
      mesh: the devices.
      axis: name of the mesh axis that the KV heads are spread over; over other axes of the mesh
        the cache is repeated.
    """

    mesh: jax.sharding.Mesh
    axis: str

    @classmethod
    def over(
        cls, mesh: jax.sharding.Mesh | None, axis: str | None, num_kv_heads: int
    ) -> Placement | None:
        """Checks a mesh that a caller gave; None for one device.

        Raises:
          ConfigError: `axis` is none of the mesh, or does not divide the KV heads.
        """
        if mesh is None:
            if axis is not None:
                raise ConfigError(f"expected a mesh with the axis {axis!r}, got none; pass mesh=")
            return None
        require("mesh", mesh, jax.sharding.Mesh, "make one with jax.make_mesh")
        if axis is None and len(mesh.axis_names) == 1:
            axis = mesh.axis_names[0]
        if axis is None or axis not in mesh.axis_names:
            raise ConfigError(
                f"expected axis to be one of the mesh's {mesh.axis_names}, got {axis!r}; name the "
                "axis for the KV heads"
            )
        size = mesh.shape[axis]
        if num_kv_heads % size:
            raise ConfigError(
                f"expected the number of KV heads to be a multiple of the {size} devices of axis "
                f"{axis!r}, got {num_kv_heads}; use a number of devices that divides it"
            )
        # The compiler places what surrounds the attention, whatever the caller's mesh says.
        automatic = (jax.sharding.AxisType.Auto,) * len(mesh.axis_names)
        return cls(jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=automatic), axis)

    @property
    def size(self) -> int:
        """Devices that share the KV heads."""
        return int(self.mesh.shape[self.axis])

    def specs(self, cache: HostKV) -> HostKV:
        """The partition of each of a cache's arrays, as a HostKV of partition specs."""
        whole = jax.tree.map(lambda _: PartitionSpec(), cache)
        cut = PartitionSpec(None, self.axis)
        parts: dict[str, Any] = {name: tuple(cut for _ in getattr(cache, name)) for name in BY_HEAD}
        return whole.replace(**parts, home=PartitionSpec(self.axis))  # type: ignore[no-any-return]

    def local(self, cache: HostKV) -> HostKV:
        """What one device sees of a cache inside `shard_map`: an ordinary one of fewer heads."""
        heads = cache.layout.num_kv_heads // self.size
        layout = dataclasses.replace(cache.layout, num_kv_heads=heads)
        return cache.replace(layout=layout, placement=None)


def memory_sharding(kind: str) -> jax.sharding.SingleDeviceSharding:
    """The default device's memory of a kind, `"device"` or `"pinned_host"`."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    return jax.sharding.SingleDeviceSharding(device, memory_kind=kind)


def array_sharding(
    placement: Placement | None, spec: PartitionSpec, kind: str = "device"
) -> jax.sharding.Sharding:
    """Where an array lies: its part of the mesh, or the default device."""
    if placement is None:
        return memory_sharding(kind)
    return NamedSharding(placement.mesh, spec, memory_kind=kind)


def filled(shape: tuple[int, ...], value: int, dtype: Any, sharding: Any) -> jax.Array:
    """A new array of one value where `sharding` says, in memory that XLA owns."""
    if sharding.memory_kind == "pinned_host" and jax.default_backend() != "cpu":
        # A program's result would pass through as much memory on the device.
        # Zeros take no memory until they are written, and they are only read.
        given = np.full(shape, value, dtype) if value else np.zeros(shape, dtype)
        return jax.device_put(given, sharding)
    return _fill_program(shape, value, jnp.dtype(dtype), sharding)()  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=64)
def _fill_program(shape: tuple[int, ...], value: int, dtype: Any, sharding: Any) -> Any:
    space = host_ops.HOST if sharding.memory_kind == "pinned_host" else host_ops.DEVICE
    # The result must be typed as host memory too, or the first step would compile for another type.
    return jax.jit(
        lambda: jax.device_put(jnp.full(shape, value, dtype), space),
        out_shardings=sharding,
    )


def take_rows(x: jax.Array, index: np.ndarray) -> jax.Array:
    """Copies rows of an array into a new one that XLA owns, in the same memory."""
    if not x.is_fully_addressable:
        raise UnsupportedError(
            "expected a cache whose devices all belong to this process, got one of several "
            "processes; fork needs a cache of one process"
        )
    if x.sharding.memory_kind == "pinned_host" and jax.default_backend() != "cpu":
        return jax.device_put(np.asarray(x)[index], x.sharding)
    # Not through NumPy here: JAX would adopt its memory, and copy it when it is donated.
    return _take_rows_program(x.sharding)(x, index)  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=16)
def _take_rows_program(sharding: Any) -> Any:
    space = host_ops.HOST if sharding.memory_kind == "pinned_host" else host_ops.DEVICE
    return jax.jit(
        lambda x, index: host_ops.retag(host_ops.retag(x, host_ops.DEVICE)[index], space),
        out_shardings=sharding,
    )


def addresses(x: jax.Array | None) -> dict[Any, list[int]]:
    """Where an array's parts lie, as two 32-bit words each, the lower one first, by device."""
    if x is None:
        return {}
    found = {}
    for shard in x.addressable_shards:
        address = shard.data.unsafe_buffer_pointer()
        found[shard.device] = [address & 0xFFFFFFFF, address >> 32]
    return found
