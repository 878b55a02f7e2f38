"""The split: which part of a layer's selected blocks the host attends to, and which the device.

The unit of the split is a range of a task's blocks, so even one task can be shared. Tasks are taken
largest first by the bytes they may touch; at most one task of a layer lies on both sides. The split
is data: changing it does not recompile. Axes: B batch, K KV heads, N query heads.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from fluxion_jax.errors import ConfigError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Split:
    """A forced split; build it with `split_at` or `one_sided`.

    Attributes:
      host_fraction: float32 scalar, share of the work that goes to the host, 0 to 1.
      sides: static, `"both"`, `"host"` or `"device"`: a program in which one side never has work
        is compiled without it.
    """

    host_fraction: jax.Array | np.ndarray
    sides: Literal["both", "host", "device"] = dataclasses.field(
        default="both", metadata={"static": True}
    )

    def boundaries(self, host_blocks: jax.Array, wanted_blocks: jax.Array) -> jax.Array:
        """Cuts every task into a host range and a device range.

        Args:
          host_blocks: int32 `[B]`, selectable blocks of each row.
          wanted_blocks: int32 `[B, K]`, an upper bound of the blocks each task will read.

        Returns:
          int32 `[B, K]`: the host attends to selected blocks with an id below it, the device to
          the rest. 0 gives the task to the device, `host_blocks` to the host.
        """
        batch, kv_heads = wanted_blocks.shape
        everything = jnp.broadcast_to(host_blocks[:, None], wanted_blocks.shape)
        if self.sides != "both":
            return everything if self.sides == "host" else jnp.zeros_like(everything)
        size = wanted_blocks.reshape(-1).astype(jnp.float32)
        order = jnp.argsort(-size, stable=True)
        before = jnp.cumsum(size[order]) - size[order]
        left = jnp.clip(self.host_fraction * size.sum() - before, 0.0, size[order])
        share = jnp.where(size[order] > 0, left / jnp.maximum(size[order], 1.0), 0.0)
        share = jnp.zeros_like(share).at[order].set(share).reshape(batch, kv_heads)
        blocks = host_blocks[:, None].astype(jnp.float32)
        cut = jnp.round(share * blocks).astype(jnp.int32)
        return jnp.where(self.host_fraction >= 1.0, everything, cut)


def split_at(host_fraction: float) -> Split:
    """Gives the host this share of the work, by an upper bound of the blocks to be read.

    Args:
      host_fraction: 0 (everything on the device) to 1 (everything on the host).

    Raises:
      ConfigError: the share is out of range.
    """
    if not 0.0 <= host_fraction <= 1.0:
        raise ConfigError(f"expected a host fraction in [0, 1], got {host_fraction}")
    return Split(np.asarray(host_fraction, np.float32))


def one_sided(side: Literal["host", "device"]) -> Split:
    """Gives one side all the work and compiles the program without the other.

    Raises:
      ConfigError: there is no such side.
    """
    if side not in ("host", "device"):
        raise ConfigError(f"expected side 'host' or 'device', got {side!r}; name one of them")
    return Split(np.asarray(1.0 if side == "host" else 0.0, np.float32), side)


def parse_split(split: str | float | Split | None) -> Split:
    """Turns `"host"`, `"device"` or a share of the host, 0 to 1, into a split.

    A share compiles both sides, even if it is 0 or 1, so that it can change without recompiling.

    Args:
      split: None means `"host"`: without a cost model the place where the cache lies computes.

    Raises:
      ConfigError: the text is not a split, or the share is out of range.
    """
    if split is None or split == "host":
        return one_sided("host")
    if split == "device":
        return one_sided("device")
    if isinstance(split, Split):
        return split
    try:
        return split_at(float(split))
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"expected split 'host', 'device' or a host fraction in [0, 1], got {split!r}"
        ) from None
