"""What a model, a context and a batch need: which bytes lie where, and what a token may cost.

Bytes are counted from the shapes that `HostKV.allocate` uses. Times are predictions of a simple
model with the constants of a machine, which say nothing about a machine that nobody measured: the
weights once at the device's bandwidth, for each layer a fixed time, and by the cost model that also
splits the work the selected K/V and, where they lie on the host, the scored summaries.
"""

from __future__ import annotations

import dataclasses
import json
import math
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from fluxion_jax.cache.layout import GRANULARITIES_TOKENS, KVLayout, host_tokens
from fluxion_jax.errors import (
    ConfigError,
    IntegrityError,
    is_one_of,
    require,
    require_integer,
    require_path,
)
from fluxion_jax.models.config import ModelConfig
from fluxion_jax.policy import CostModel, FixedPolicy, parse_policy
from fluxion_jax.rope import Rope

SplitName = Literal["host", "device", "model"]
DEFAULT_MACHINE = "h100"
DEFAULT_LAYER_S = 84e-6
"""See `Machine.layer_s`. Median of eight steps of an 8B-shaped model, 128K tokens, on an H100."""


def _llama(vocab: int, width: int, layers: int, heads: int, kv: int, ff: int) -> ModelConfig:
    return ModelConfig(
        architecture="llama",
        vocab_size=vocab,
        d_model=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=128,
        d_ff=ff,
        max_context_tokens=131_072,
        norm_eps=1e-5,
        rope=Rope(500_000.0),
        tied_embeddings=False,
    )


SHAPES = {
    "8b": _llama(128_256, 4096, 32, 32, 8, 14_336),
    "70b": _llama(128_256, 8192, 80, 64, 8, 28_672),
    "qwen3-8b": dataclasses.replace(
        _llama(151_936, 4096, 36, 32, 8, 12_288), architecture="qwen3", qk_norm=True
    ),
    "mistral-7b": dataclasses.replace(
        _llama(32_768, 4096, 32, 32, 8, 14_336), architecture="mistral"
    ),
}


@dataclasses.dataclass(frozen=True)
class Machine:
    """Constants of a machine, measured on it.

    Attributes:
      name: what it is.
      cost: rates of reading the host cache by either side, and fixed costs of a layer that does;
        the one that `split="model"` divides work by.
      device_bytes_per_s: at which decoding reads weights.
      layer_s: what a layer takes besides: kernels too short for their bytes to count, and the
        waiting between them.
    """

    name: str
    cost: CostModel
    device_bytes_per_s: float
    layer_s: float = DEFAULT_LAYER_S

    @classmethod
    def load(cls, path_or_name: str | Path = DEFAULT_MACHINE) -> Machine:
        """Reads a report of `fluxion bench machine`, or the constants that come with the package.

        A report says nothing of `layer_s`, which keeps its default. Without a GPU weights are read
        from the host's memory.

        Args:
          path_or_name: a JSON file, or `"h100"`.

        Returns:
          The constants.

        Raises:
          ConfigError: there is no such file or machine.
          IntegrityError: it holds something else.
        """
        require_path(path_or_name, "a machine's JSON report, or the name of one")
        packaged = resources.files("fluxion_jax") / "machines" / f"{path_or_name}.json"
        path = Path(path_or_name).expanduser()
        if not path.is_file() and not packaged.is_file():
            raise ConfigError(
                f"expected a machine's JSON file or {DEFAULT_MACHINE!r}, got "
                f"{str(path_or_name)!r}; check the path"
            )
        source = path if path.is_file() else packaged
        try:
            return _machine(json.loads(source.read_text(encoding="utf-8")), str(path_or_name))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(
                "expected a JSON report with the numbers of a cost_model and the rate of a device "
                f"copy in {source}, got: {error!r}; write one with fluxion bench machine --output "
                "DIR"
            ) from error


def _machine(found: dict[str, Any], name: str) -> Machine:
    cost = CostModel.from_dict(found["cost_model"])
    if "device_bytes_per_s" in found:
        device_bytes_per_s = float(found["device_bytes_per_s"])
    else:
        # Of several rows of reads by the host the last is by all threads.
        rates = {row["pipe"]: 1e9 * float(row["gb_s"]["median"]) for row in found["rows"]}
        device_bytes_per_s = rates.get("device copy", rates["host read"])
    layer_s = float(found.get("layer_s", DEFAULT_LAYER_S))
    if not (0 < device_bytes_per_s < math.inf and 0 <= layer_s < math.inf):
        raise ValueError(f"device_bytes_per_s {device_bytes_per_s} and layer_s {layer_s}")
    return Machine(str(found.get("name", name)), cost, device_bytes_per_s, layer_s)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes by what they are for.

    Attributes:
      host_kv_bytes: keys and values in host memory.
      host_summary_bytes: block summaries in host memory.
      device_weight_bytes: parameters.
      device_window_bytes: resident windows and sliding-window layers.
      device_summary_bytes: block summaries on the device, and all scales.
    """

    host_kv_bytes: int
    host_summary_bytes: int
    device_weight_bytes: int
    device_window_bytes: int
    device_summary_bytes: int

    @property
    def host_bytes(self) -> int:
        """All of it in host memory, as `HostKV.host_bytes`."""
        return self.host_kv_bytes + self.host_summary_bytes

    @property
    def device_cache_bytes(self) -> int:
        """The cache's part of device memory, as `HostKV.device_bytes`."""
        return self.device_window_bytes + self.device_summary_bytes


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` returns; `print` shows it as a table.

    Attributes:
      model: name of the model.
      policy: what each head reads.
      context_tokens: capacity of a sequence.
      batch: sequences.
      split: who reads the host cache.
      memory: bytes by place.
      machine: whose constants the times are predicted with.
      dense_s: predicted time of a step for the weights.
      layers_s: for what layers take whatever they read.
      read_bytes: per step from host memory, K/V and summaries: if all heads of a group select the
        same units, and if none of them do.
      read_s: for reading that, each of the two.
    """

    model: str
    policy: str
    context_tokens: int
    batch: int
    split: SplitName
    memory: Memory
    machine: Machine
    dense_s: float
    layers_s: float
    read_bytes: tuple[int, int]
    read_s: tuple[float, float]

    @property
    def step_s(self) -> tuple[float, float]:
        """Predicted time of a step, for each of the two `read_bytes`."""
        low, high = (self.dense_s + self.layers_s + seconds for seconds in self.read_s)
        return low, high

    def to_dict(self) -> dict[str, Any]:
        """As JSON wants it."""
        return dataclasses.asdict(self) | {
            "host_bytes": self.memory.host_bytes,
            "device_cache_bytes": self.memory.device_cache_bytes,
            "step_s": self.step_s,
        }

    def __str__(self) -> str:
        memory = self.memory
        rows = (
            ("host memory", "keys and values", memory.host_kv_bytes),
            ("", "summaries", memory.host_summary_bytes),
            ("device memory", "weights", memory.device_weight_bytes),
            ("", "resident windows", memory.device_window_bytes),
            ("", "summaries and scales", memory.device_summary_bytes),
        )
        lines = [f"{self.model}, {self.batch} x {self.context_tokens} tokens, policy {self.policy}"]
        lines += [f"  {place:14}{what:22}{_gib(size):>14}" for place, what, size in rows]
        low, high = self.step_s
        lines += [
            f"predicted with the constants of {self.machine.name} (not measured), "
            f"split {self.split}:",
            "  a step reads {} to {} of host memory".format(*map(_gib, self.read_bytes)),
            f"  and takes {low * 1e3:.1f} to {high * 1e3:.1f} ms ({self.dense_s * 1e3:.1f} for the "
            f"weights, {self.layers_s * 1e3:.1f} for short kernels): "
            f"{self.batch / high:.1f} to {self.batch / low:.1f} tokens/s",
        ]
        return "\n".join(lines)


def plan(
    model: str | ModelConfig,
    *,
    context_tokens: int,
    batch: int = 1,
    policy: str | FixedPolicy = "fixed:16:0.05",
    dtype: str = "bfloat16",
    summaries: Literal["host", "device"] = "host",
    split: SplitName = "host",
    machine: Machine | None = None,
) -> Plan:
    """Says where everything of a generation would lie, and predicts the time of a step.

    Args:
      model: a configuration, one of `SHAPES`, or a directory, GGUF file or packaged model as for
        `load_model`, of which only the configuration is read.
      context_tokens: tokens of each sequence, prompt and generation together.
      batch: sequences.
      policy: `"full"` or a fixed policy.
      dtype: of weights and cache, `"bfloat16"` or `"float32"`.
      summaries: where summaries lie.
      split: who reads the host cache: `"host"`, `"device"`, or both, divided by `"model"`.
      machine: constants for the prediction; None for those of an H100.

    Returns:
      Bytes by place and the predicted time of a step; `print` shows them as a table.

    Raises:
      ConfigError: a value is out of range, or the policy is not a fixed one.

    Example:
      >>> from fluxion_jax.planning import plan
      >>> planned = plan("8b", context_tokens=131_072, batch=2)
      >>> print(str(planned).splitlines()[1])
        host memory   keys and values           31.938 GiB
    """
    require_integer("context_tokens", context_tokens)
    require_integer("batch", batch)
    if machine is not None:
        require("machine", machine, Machine, "load one with Machine.load")
    if not is_one_of(split, get_args(SplitName)):
        raise ConfigError(f"expected split 'host', 'device' or 'model', got {split!r}")
    parsed = parse_policy(policy)
    if not isinstance(parsed, FixedPolicy):
        raise ConfigError(f"expected 'full' or a fixed policy, got {policy}; others read by data")
    config, name = (model, model.architecture) if isinstance(model, ModelConfig) else _named(model)
    machine = machine or Machine.load()
    layout = config.kv_layout(dtype, summaries)
    memory = _memory(layout, config, context_tokens, batch)
    layers = len(layout.global_layers)
    per_layer = [
        batch * _row_bytes(layout, config, context_tokens, parsed, apart) for apart in (False, True)
    ]
    low, high = (layers * machine.cost.seconds(float(size), split) for size in per_layer)
    return Plan(
        model=name,
        policy=str(parsed),
        context_tokens=context_tokens,
        batch=batch,
        split=split,
        memory=memory,
        machine=machine,
        dense_s=_read_weights(config) * layout.jax_dtype.itemsize / machine.device_bytes_per_s,
        layers_s=config.num_layers * machine.layer_s,
        read_bytes=(layers * per_layer[0], layers * per_layer[1]),
        read_s=(low, high),
    )


def _memory(layout: KVLayout, config: ModelConfig, tokens: int, batch: int) -> Memory:
    shapes = layout.array_shapes(batch, tokens)

    def size(*names: str) -> int:
        return sum(
            count * math.prod(shape) * dtype.itemsize
            for count, shape, dtype in (shapes[name] for name in names)
        )

    on_host = layout.summaries == "host"
    return Memory(
        host_kv_bytes=size("k", "v"),
        host_summary_bytes=size("summaries") if on_host else 0,
        device_weight_bytes=_num_parameters(config) * layout.jax_dtype.itemsize,
        device_window_bytes=size("window_k", "window_v", "sliding_k", "sliding_v"),
        device_summary_bytes=size("exponents") + (0 if on_host else size("summaries")),
    )


def _num_parameters(config: ModelConfig) -> int:
    """Matrices and tables; norms and biases are too small to matter."""
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = config.d_model * (2 * heads + 2 * kv_heads)
    tables = 1 if config.tied_embeddings else 2
    layer = attention + 3 * config.d_model * config.d_ff
    return config.num_layers * layer + tables * config.vocab_size * config.d_model


def _read_weights(config: ModelConfig) -> int:
    """What a step reads: of a table of embeddings that is no output matrix too, a row a token."""
    table = 0 if config.tied_embeddings else config.vocab_size * config.d_model
    return _num_parameters(config) - table


def _row_bytes(
    layout: KVLayout, config: ModelConfig, tokens: int, policy: FixedPolicy, apart: bool
) -> int:
    """Bytes that a step reads of one sequence in one layer.

    Args:
      layout: of the cache.
      config: of the model.
      tokens: length of the sequence.
      policy: what a head reads.
      apart: whether the heads of a group select different units.
    """
    blocks_bytes = layout.num_kv_heads * layout.block_bytes
    on_host = host_tokens(layout, tokens)
    fraction, granularity = float(policy.budget_fraction), int(policy.granularity)
    if fraction >= 1.0:
        return on_host // GRANULARITIES_TOKENS[0] * blocks_bytes
    # As the policy rounds: a fraction in float32 must not push an exact multiple over its ceiling.
    units = math.ceil(math.ceil(fraction * tokens * (1 - 2**-22)) / granularity)
    heads = config.num_heads // config.num_kv_heads if apart and not bool(policy.per_group) else 1
    selected = min(units * heads * granularity, on_host)
    scored = math.ceil(on_host / granularity) * layout.unit_summary_bytes * layout.num_kv_heads
    summaries = scored if layout.summaries == "host" else 0
    return selected // GRANULARITIES_TOKENS[0] * blocks_bytes + summaries


def _named(model: str) -> tuple[ModelConfig, str]:
    if is_one_of(model, SHAPES):
        return SHAPES[model], model
    from fluxion_jax.models.load import load_config

    return load_config(model), model


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3f} GiB"
