"""What reading costs on either side: the numbers behind `split="model"`.

Decode attention is bound by memory on both sides, so a side's time is a fixed part and its bytes
over its rate. The rates are data: a program compiled for one machine's serves any other's.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import jax

from fluxion_jax.errors import ConfigError

MIN_RANGE_BYTES = 64 * 1024
"""Less than this of a task is not worth a hand-over: it takes either side about a microsecond."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CostModel:
    """Rates and fixed costs of one layer's sparse attention.

    The defaults are of one kind of machine (H100 80GB, 16 CPUs with AVX-512), rounded from runs in
    which its CPUs streamed 76 to 100 GB/s, copies of pinned memory took 54 GB/s and a hand-over
    without work 15 to 59 us; the device's fixed costs are an estimate. `fluxion bench machine`
    measures those of another.

    Attributes:
      host_bytes_per_s: at which the host's threads attend to selected blocks.
      pcie_bytes_per_s: at which the device reads blocks out of pinned host memory.
      host_fixed_s: of a layer with any host work: hand-over, and bringing back the result.
      device_fixed_s: of a layer with any device work: launches that do not depend on its size.
    """

    host_bytes_per_s: float = 75e9
    pcie_bytes_per_s: float = 46e9
    host_fixed_s: float = 40e-6
    device_fixed_s: float = 30e-6

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            lowest = 0.0 if field.name.endswith("_fixed_s") else 1.0
            if isinstance(value, int | float) and not lowest <= value < float("inf"):
                raise ConfigError(
                    f"expected {field.name} of at least {lowest:g}, got {value}; "
                    "rates are in bytes per second, costs in seconds"
                )

    def host_part(self) -> tuple[jax.Array | float, jax.Array | float]:
        """The host's part of a layer's bytes, so that both sides end together.

        Returns:
          `(share, ahead_bytes)`: of `total` bytes the host reads `(total + ahead_bytes) * share`,
          at least none and at most all.
        """
        host, pcie = self.host_bytes_per_s, self.pcie_bytes_per_s
        return host / (host + pcie), (self.device_fixed_s - self.host_fixed_s) * pcie

    def seconds(self, total_bytes: float, split: Literal["model", "host", "device"]) -> float:
        """The modelled time of a layer that reads so many bytes.

        Args:
          total_bytes: of keys and values, and of summaries where they lie on the host.
          split: who reads: one side, or both, divided by this model.
        """
        if not total_bytes:
            return 0.0
        host, pcie = self.host_bytes_per_s, self.pcie_bytes_per_s
        host_s = self.host_fixed_s + total_bytes / host
        device_s = self.device_fixed_s + total_bytes / pcie
        # A side that could not begin before the other has ended gets nothing.
        if split == "host" or (split == "model" and host_s <= self.device_fixed_s):
            return host_s
        if split == "device" or device_s <= self.host_fixed_s:
            return device_s
        fixed = host * self.host_fixed_s + pcie * self.device_fixed_s
        return (total_bytes + fixed) / (host + pcie)

    @classmethod
    def from_dict(cls, section: dict[str, Any]) -> CostModel:
        """The model of exactly these numbers, all of them, by name.

        Raises:
          ValueError: one is missing, unknown or no number.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if set(section) != names:
            raise ValueError(f"the numbers {sorted(section)} instead of {sorted(names)}")
        return cls(**{name: float(value) for name, value in section.items()})

    @classmethod
    def load(cls, path: str | Path) -> CostModel:
        """Reads the `cost_model` of a report of `fluxion bench machine --output`.

        Raises:
          ConfigError: the file cannot be read, has no such section, or it has other fields.
        """
        try:
            document: Any = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
            return cls.from_dict(document["cost_model"])
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            names = [field.name for field in dataclasses.fields(cls)]
            raise ConfigError(
                f"expected a JSON report with a cost_model of {names} in {path}, got none "
                f"({error}); write one with fluxion bench machine --output DIR"
            ) from error
