"""What a generation did: counts and times, added up in exact integers on the Python side.

Bytes follow from counts: a block read once for a whole group, K and V; a summary scored, minimum
and maximum. Axes: L global layers.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np

import host_ops
from fluxion_jax.cache.layout import BLOCK_TOKENS, KVLayout
from fluxion_jax.decode import LayerTotals


@dataclasses.dataclass
class DecodeStats:
    """Counts and times of the decode steps of one generation.

    Attributes:
      layout: the cache's layout, from which bytes follow.
      host: which host operations ran: "native", "xla" or "numpy".
      num_steps: decode steps done.
      num_tokens: tokens that came out, over all rows.
      prompt_tokens: tokens that were prefilled, over all rows.
      prefill_s: wall time of the prefill, compilation included.
      decode_s: wall time of the decode steps, compilation included.
      compile_s: wall time spent on tracing and compiling the decode program; included in
        `decode_s`, 0 if it was compiled before.
      cached_blocks: host blocks that could have been read, summed over steps, rows and KV heads of
        one layer.
      host_blocks: int64 `[L]`, blocks the host read.
      device_blocks: int64 `[L]`, blocks the device read out of host memory.
      host_units: int64 `[L]`, summaries the host scored.
      device_units: int64 `[L]`, summaries the device scored.
      clipped: int64 `[L]`, heads whose budget was cut to what the host held, over steps and rows.
      host_times_s: float64 `[L, 9]`, in the order of `host_ops.TIMES`.
      recall: float64 `[L]`, mean share of the attention mass that was read, or None.
      output_error: float64 `[L]`, mean error over the step's largest head output, or None.
    """

    layout: KVLayout
    host: str = ""
    num_steps: int = 0
    num_tokens: int = 0
    prompt_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    compile_s: float = 0.0
    cached_blocks: int = 0
    host_blocks: Any = 0
    device_blocks: Any = 0
    host_units: Any = 0
    device_units: Any = 0
    clipped: Any = 0
    host_times_s: Any = 0.0
    recall: np.ndarray | None = None
    output_error: np.ndarray | None = None

    def add(self, totals: LayerTotals, num_steps: int) -> None:
        """Adds a chunk's sums.

        Args:
          totals: sums over the steps of the chunk.
          num_steps: its steps.
        """
        self.num_steps += num_steps
        for name in ("host_blocks", "device_blocks", "host_units", "device_units", "clipped"):
            setattr(self, name, getattr(self, name) + np.asarray(getattr(totals, name), np.int64))
        self.cached_blocks += int(totals.cached_blocks)
        self.host_times_s = self.host_times_s + np.asarray(totals.host_times_s, np.float64)
        for name in ("recall", "output_error"):
            summed = np.asarray(getattr(totals, name), np.float64)
            if not np.isnan(summed).any():
                before = getattr(self, name)
                earlier = 0.0 if before is None else before * (self.num_steps - num_steps)
                setattr(self, name, (earlier + summed) / max(self.num_steps, 1))

    @property
    def host_bytes(self) -> int:
        """Bytes read out of host memory, by either side: K/V blocks and summaries kept there."""
        blocks = int(np.sum(self.host_blocks) + np.sum(self.device_blocks))
        units = int(np.sum(self.host_units) + np.sum(self.device_units))
        if self.layout.summaries == "device":
            units = 0
        return blocks * self.layout.block_bytes + units * self.layout.unit_summary_bytes

    @property
    def host_bytes_per_token(self) -> float:
        """Bytes read out of host memory per token that came out."""
        return self.host_bytes / self.num_tokens if self.num_tokens else 0.0

    @property
    def read_fraction(self) -> float:
        """Share of the host cache's K/V blocks that was read."""
        offered = self.cached_blocks * max(1, len(self.layout.global_layers))
        read = int(np.sum(self.host_blocks) + np.sum(self.device_blocks))
        return read / offered if offered else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of decoding, without compiling."""
        running_s = self.decode_s - self.compile_s
        return self.num_tokens / running_s if self.num_tokens and running_s > 0 else float("nan")

    @property
    def host_ms_per_step(self) -> float:
        """Milliseconds from submit to the host's last task, over all layers of a step."""
        if not self.num_steps or np.ndim(self.host_times_s) != 2:
            return float("nan")
        return (
            float(self.host_times_s[:, host_ops.TIMES.index("span")].sum()) * 1e3 / self.num_steps
        )

    def table(self) -> str:
        """A line for each layer with a host cache: what was read per step, and the host's time."""
        layout, steps = self.layout, max(self.num_steps, 1)
        shape = (len(layout.global_layers),)
        unit = layout.unit_summary_bytes if layout.summaries == "host" else 0

        def kib(blocks: Any, units: Any) -> np.ndarray:
            read = np.asarray(blocks) * layout.block_bytes + np.asarray(units) * unit
            return np.broadcast_to(read / 1024 / steps, shape)

        host, device = (
            kib(blocks, units)
            for blocks, units in (
                (self.host_blocks, self.host_units),
                (self.device_blocks, self.device_units),
            )
        )
        blocks = np.broadcast_to(np.asarray(self.host_blocks) + self.device_blocks, shape)
        share = blocks / max(self.cached_blocks, 1)
        span = host_ops.TIMES.index("span")
        timed = np.ndim(self.host_times_s) == 2
        taken = self.host_times_s[:, span] / steps if timed else np.full(shape, np.nan)
        rows = [
            (str(layer), *figures)
            for layer, *figures in zip(
                layout.global_layers, host, device, share, 1e6 * taken, strict=True
            )
        ]
        rows.append(("all", host.sum(), device.sum(), share.mean(), 1e6 * taken.sum()))
        lines = ["layer  host KiB/step  device KiB/step  K/V read  host us/step"]
        lines += [
            f"{name:>5}  {host:13.1f}  {device:15.1f}  {share:8.1%}  {us:12.0f}"
            for name, host, device, share, us in rows
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values; a figure that was not measured is None."""
        figures: dict[str, Any] = {
            "host": self.host,
            "num_steps": self.num_steps,
            "num_tokens": self.num_tokens,
            "prompt_tokens": self.prompt_tokens,
            "prefill_s": self.prefill_s,
            "decode_s": self.decode_s,
            "compile_s": self.compile_s,
            "tokens_per_s": self.tokens_per_s,
            "host_ms_per_step": self.host_ms_per_step,
            "host_bytes_per_token": self.host_bytes_per_token,
            "read_fraction": self.read_fraction,
            "clipped_budgets": int(np.sum(self.clipped)),
            "block_tokens": BLOCK_TOKENS,
        }
        figures = {
            k: None if isinstance(v, float) and not np.isfinite(v) else v
            for k, v in figures.items()
        }
        for name in ("recall", "output_error"):
            value = getattr(self, name)
            figures[name] = None if value is None else [float(x) for x in value]
        return figures

    def to_json(self) -> str:
        """`to_dict` as a JSON document."""
        return json.dumps(self.to_dict(), allow_nan=False)

    def __str__(self) -> str:
        speed = "" if np.isnan(self.tokens_per_s) else f", {self.tokens_per_s:.1f} tokens/s"
        host = (
            ""
            if np.isnan(self.host_ms_per_step)
            else (f", host {self.host_ms_per_step:.2f} ms per step")
        )
        return (
            f"{self.num_tokens} tokens in {self.num_steps} steps{speed}{host}; "
            f"{self.host_bytes_per_token / 2**20:.2f} MiB of the host cache per token "
            f"({self.read_fraction:.1%} of its K/V)"
        )
