"""The split: which part of a layer's selected blocks the host attends to, and which the device.

The unit of the split is a range of a task's blocks, so even one task can be shared. Tasks are taken
largest first by the bytes they may touch; at most one task of a layer lies on both sides. The split
is data: changing it does not recompile. Axes: B batch, K KV heads, N query heads.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fluxion_jax.errors import ConfigError
from fluxion_jax.policy.cost_model import MIN_RANGE_BYTES, CostModel
from fluxion_jax.policy.scheduler import corrected


class Cut(NamedTuple):
    """How a split's tasks are cut: the host gets `(total + ahead_bytes) * share` of their bytes.

    Attributes:
      share: float32 scalar, 0 to 1.
      ahead_bytes: float32 scalar, by how much the host begins earlier.
      least_bytes: a smaller part than this of a task goes with the rest of it.
      counts_summaries: whether the summaries that a task scans are part of its bytes.
    """

    share: jax.Array
    ahead_bytes: jax.Array
    least_bytes: int
    counts_summaries: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Split:
    """Who reads what; build it with `split_at`, `one_sided`, `modelled` or `adaptive`.

    Attributes:
      host_fraction: float32 scalar, share of the work that goes to the host, 0 to 1; unused where
        there is a cost model.
      sides: static, `"both"`, `"host"` or `"device"`: a program in which one side never has work
        is compiled without it.
      cost: splits so that both sides end together by this model, or None.
      adapts: static, whether the model is corrected by what layers took; see `scheduler`.
    """

    host_fraction: jax.Array | np.ndarray
    sides: Literal["both", "host", "device"] = dataclasses.field(
        default="both", metadata={"static": True}
    )
    cost: CostModel | None = None
    adapts: bool = dataclasses.field(default=False, metadata={"static": True})

    def __str__(self) -> str:
        if self.sides != "both":
            return self.sides
        if self.cost is not None:
            return "adaptive" if self.adapts else "model"
        if isinstance(self.host_fraction, jax.core.Tracer):
            return "a traced split"
        return f"{float(self.host_fraction):.6g}"

    def at_pace(self, pace: jax.Array) -> Split:
        """This split with its cost model corrected, if it adapts."""
        if not self.adapts or self.cost is None:
            return self
        return dataclasses.replace(self, cost=corrected(self.cost, pace))

    def cut(self) -> Cut:
        """How tasks are cut where both sides have work."""
        part: tuple[Any, Any] = self.host_fraction, 0.0
        if self.cost is not None:
            part = self.cost.host_part()
        share, ahead = (jnp.asarray(x, jnp.float32) for x in part)
        modelled = self.cost is not None
        return Cut(share, ahead, MIN_RANGE_BYTES if modelled else 0, modelled)

    def boundaries(
        self,
        host_blocks: jax.Array,
        wanted_blocks: jax.Array,
        block_bytes: int,
        scanned_bytes: jax.Array | int = 0,
    ) -> jax.Array:
        """Cuts every task into a host range and a device range.

        Args:
          host_blocks: int32 `[B]`, selectable blocks of each row.
          wanted_blocks: int32 `[B, K]`, an upper bound of the blocks each task will read.
          block_bytes: keys and values of one block.
          scanned_bytes: int32 `[B, K]`, summaries that are read to rank a task, on the side that
            has the task; 0 where they are not read from host memory.

        Returns:
          int32 `[B, K]`: the host attends to selected blocks with an id below it, the device to
          the rest. 0 gives the task to the device, `host_blocks` to the host.
        """
        everything = jnp.broadcast_to(host_blocks[:, None], wanted_blocks.shape)
        if self.sides != "both":
            return everything if self.sides == "host" else jnp.zeros_like(everything)
        size = wanted_blocks.astype(jnp.float32) * block_bytes
        share, ahead, least, counts_summaries = self.cut()
        size = size + scanned_bytes if counts_summaries else size
        size, blocks = size.reshape(-1), everything.reshape(-1)
        total = size.sum()
        of_host = _host_shares(size, jnp.clip((total + ahead) * share, 0.0, total), least)
        cut = jnp.round(of_host * blocks.astype(jnp.float32)).astype(jnp.int32)
        return jnp.where(of_host >= 1.0, blocks, cut).reshape(wanted_blocks.shape)


def _host_shares(size: jax.Array, host: jax.Array, least: int) -> jax.Array:
    """The host's share of each task, largest first until `host` is spent: float32 `[tasks]`.

    Compares all pairs instead of sorting: on a GPU a sort of a few tasks is many launches.
    """
    task = jnp.arange(size.size)
    earlier = (size > size[:, None]) | ((size == size[:, None]) & (task < task[:, None]))
    before = jnp.where(earlier, size, 0.0).sum(axis=-1)
    part = jnp.clip(host - before, 0.0, size)
    too_little = (part < least) | (size - part < least)
    part = jnp.where(too_little, jnp.where(2 * part >= size, size, 0.0), part)
    # A task without work goes where everything goes before it is split.
    idle = jnp.where(host >= size.sum(), 1.0, 0.0)
    return jnp.where(size > 0, part / jnp.maximum(size, 1.0), idle)


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


def modelled(cost: CostModel | None = None) -> Split:
    """Splits so that both sides end together by a cost model.

    Args:
      cost: rates of this machine; None for those of one H100 machine.
    """
    return Split(np.asarray(1.0, np.float32), cost=cost or CostModel())


def adaptive(cost: CostModel | None = None) -> Split:
    """Splits by a cost model that the times of every layer correct.

    The split then depends on clocks, so two runs may differ in the last bits; `modelled` repeats.

    Args:
      cost: rates to begin with; None for those of one H100 machine.
    """
    return dataclasses.replace(modelled(cost), adapts=True)


def parse_split(split: str | float | Split | None) -> Split:
    """Turns `"host"`, `"device"`, `"model"`, `"adaptive"` or a host's share, 0 to 1, into a split.

    `"model"` uses the rates of one H100 machine, and `"model:FILE"` those in a report of
    `fluxion bench machine`. `"adaptive"` and `"adaptive:FILE"` begin with them and correct them.

    A share compiles both sides, even if it is 0 or 1, so that it can change without recompiling.

    Args:
      split: None means `"host"`: without a cost model the place where the cache lies computes.

    Returns:
      The split; its share is data, so that another one compiles nothing.

    Raises:
      ConfigError: the text is not a split, the share is out of range, or the file is no report.

    Example:
      >>> import fluxion_jax as fx
      >>> print(fx.parse_split("host"), fx.parse_split(0.25), fx.parse_split("model"), sep=", ")
      host, 0.25, model
    """
    if split is None:
        return one_sided("host")
    if isinstance(split, Split):
        return split
    if isinstance(split, str):
        if split in ("host", "device"):
            return one_sided("host" if split == "host" else "device")
        for name, build in (("model", modelled), ("adaptive", adaptive)):
            if split == name:
                return build()
            if split.startswith(f"{name}:"):
                return build(CostModel.load(split.removeprefix(f"{name}:")))
    try:
        return split_at(float(split))
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            "expected split 'host', 'device', 'model', 'model:FILE', 'adaptive', 'adaptive:FILE' "
            f"or a host fraction in [0, 1], got {split!r}"
        ) from None
