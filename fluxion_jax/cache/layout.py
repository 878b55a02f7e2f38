"""The layout of a KV cache: which layers lie where, in what shape, and how many bytes that takes.

Only this file knows the order of axes and the arithmetic of positions. Axes: B batch, K KV heads,
P host blocks, C tokens of a block, H head size, U summary units, R slots of the ring.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from fluxion_jax.errors import ConfigError, is_one_of, require

BLOCK_TOKENS = 16
GRANULARITIES_TOKENS = (16, 32, 64, 128)
# The coarsest unit spans this many blocks; a capacity in whole coarse units keeps every level full.
_BLOCKS_PER_COARSEST = GRANULARITIES_TOKENS[-1] // BLOCK_TOKENS


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise ConfigError(text)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class KVLayout:
    """The static description of a cache; hashable, so it is part of a compiled program's key.

    Attributes:
      num_layers: attention layers of the model.
      num_kv_heads: KV heads `K` of a layer.
      head_dim: head size `H`, a multiple of 8 up to 256.
      dtype: `"bfloat16"` (default: half the bytes of float32, and its range), `"float16"` (the same
        bytes, 11 bits of precision instead of 8, but beyond 65504 keys and values become infinite)
        or `"float32"`.
      sink_tokens: first tokens that stay on the device; 64 as in the paper, a multiple of 16.
      recent_tokens: last tokens that stay on the device; 256 as in the paper, a multiple of 16. Up
        to 15 more stay until they fill a block.
      summaries: where block summaries live, `"host"` (default: no device memory) or `"device"`
        (faster scoring on a GPU).
      sliding_window: tokens seen by sliding-window layers, or None if there are none.
      sliding_layers: layers that use it; their keys never leave the device.
      num_heads: query heads `N` of a layer, or None where nothing needs to know them.
      sketch: whether the device keeps a sketch of the host cache for policies that look at it
        before they plan, such as `fluxion`; off by default, because it takes work in every step.
        It needs `num_heads`.

    Raises:
      ConfigError: a field is out of range.

    Example:
      >>> import fluxion_jax as fx
      >>> layout = fx.KVLayout(num_layers=32, num_kv_heads=8, head_dim=128)
      >>> layout.block_bytes, layout.host_blocks(131_072)
      (8192, 8176)
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    sink_tokens: int = 64
    recent_tokens: int = 256
    summaries: Literal["host", "device"] = "host"
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()
    num_heads: int | None = None
    sketch: bool = False

    def __post_init__(self) -> None:
        integers = ["num_layers", "num_kv_heads", "head_dim", "sink_tokens", "recent_tokens"]
        integers += [n for n in ("sliding_window", "num_heads") if getattr(self, n) is not None]
        for name in integers:
            value = getattr(self, name)
            _require(_is_integer(value), f"expected an integer {name}, got {value!r}")
        layers: Any = self.sliding_layers
        _require(
            isinstance(layers, tuple) and all(map(_is_integer, layers)),
            f"expected a tuple of layers as sliding_layers, got {layers!r}",
        )
        require("sketch", self.sketch, bool, "say True or False")
        _require(self.num_layers >= 1, f"expected num_layers >= 1, got {self.num_layers}")
        _require(self.num_kv_heads >= 1, f"expected num_kv_heads >= 1, got {self.num_kv_heads}")
        _require(
            self.head_dim % 8 == 0 and 8 <= self.head_dim <= 256,
            f"expected head_dim to be a multiple of 8 up to 256, got {self.head_dim}",
        )
        _require(
            is_one_of(self.dtype, ("bfloat16", "float16", "float32")),
            f"expected dtype 'bfloat16', 'float16' or 'float32', got {self.dtype!r}",
        )
        for name in ("sink_tokens", "recent_tokens"):
            value = getattr(self, name)
            _require(
                value >= 0 and value % BLOCK_TOKENS == 0,
                f"expected {name} to be a multiple of {BLOCK_TOKENS}, got {value}",
            )
        _require(self.recent_tokens > 0, "expected recent_tokens > 0, got 0")
        _require(
            self.num_heads is None
            or (self.num_heads >= 1 and self.num_heads % self.num_kv_heads == 0),
            f"expected num_heads to be a multiple of {self.num_kv_heads} KV heads, got "
            f"{self.num_heads}",
        )
        _require(
            is_one_of(self.summaries, ("host", "device")),
            f"expected summaries 'host' or 'device', got {self.summaries!r}",
        )
        _require(
            all(0 <= layer < self.num_layers for layer in self.sliding_layers),
            f"expected sliding_layers within [0, {self.num_layers}), got {self.sliding_layers}",
        )
        _require(
            not self.sketch or self.num_heads is not None,
            "expected num_heads for a cache with a sketch, got None; name the query heads",
        )
        if self.sliding_layers:
            _require(
                self.sliding_window is not None and self.sliding_window > 0,
                f"expected sliding_window > 0 for sliding layers, got {self.sliding_window}",
            )

    @property
    def jax_dtype(self) -> Any:
        """The dtype of keys and values as an object."""
        return jnp.dtype(self.dtype)

    @property
    def global_layers(self) -> tuple[int, ...]:
        """Layers that attend to everything and so have a host cache."""
        sliding = set(self.sliding_layers)
        return tuple(layer for layer in range(self.num_layers) if layer not in sliding)

    @property
    def ring_tokens(self) -> int:
        """Slots `R` of the ring of recent tokens.

        One block more than `recent_tokens`, because a leaving block is attended in the window
        during the very step that writes it.
        """
        return self.recent_tokens + BLOCK_TOKENS

    @property
    def window_tokens(self) -> int:
        """Slots of the resident window: the sinks, then the ring."""
        return self.sink_tokens + self.ring_tokens

    @property
    def block_bytes(self) -> int:
        """Bytes of K and V of one block of one KV head."""
        return 2 * BLOCK_TOKENS * self.head_dim * self.jax_dtype.itemsize

    @property
    def unit_summary_bytes(self) -> int:
        """Bytes of one summary: int8 minimum and maximum per channel."""
        return 2 * self.head_dim

    def array_shapes(
        self, batch: int, max_tokens: int
    ) -> dict[str, tuple[int, tuple[int, ...], Any]]:
        """How many arrays of what shape and dtype each per-layer field of a cache holds.

        Args:
          batch: rows B.
          max_tokens: capacity of a sequence.

        Returns:
          By name of `HostKV`'s field: the number of layers, the shape, the dtype.
        """
        heads = (batch, self.num_kv_heads)
        blocks = self.host_blocks(max_tokens)
        host = (*heads, blocks, BLOCK_TOKENS, self.head_dim)
        window = (*heads, self.window_tokens, self.head_dim)
        ring = (*heads, min(self.sliding_window or 0, max_tokens), self.head_dim)
        num_global, num_sliding = len(self.global_layers), len(self.sliding_layers)
        return {
            "k": (num_global, host, self.jax_dtype),
            "v": (num_global, host, self.jax_dtype),
            "summaries": (
                num_global,
                (*heads, num_units(blocks), 2, self.head_dim),
                jnp.dtype(jnp.int8),
            ),
            "exponents": (num_global, (*heads, self.head_dim), jnp.dtype(jnp.int32)),
            "window_k": (num_global, window, self.jax_dtype),
            "window_v": (num_global, window, self.jax_dtype),
            "sliding_k": (num_sliding, ring, self.jax_dtype),
            "sliding_v": (num_sliding, ring, self.jax_dtype),
        }

    def global_index(self, layer: int) -> int:
        """Position of a layer among the global layers.

        Args:
          layer: index of the layer in the model.

        Returns:
          A Python int.

        Raises:
          ConfigError: there is no such layer.
        """
        _require(
            layer in self.global_layers,
            f"expected a global layer, one of {self.global_layers}, got {layer}",
        )
        return self.global_layers.index(layer)

    def sliding_index(self, layer: int) -> int:
        """Position of a layer among the sliding-window layers.

        Args:
          layer: index of the layer in the model.

        Returns:
          A Python int.

        Raises:
          ConfigError: there is no such layer.
        """
        _require(
            layer in self.sliding_layers,
            f"expected a sliding layer, one of {self.sliding_layers}, got {layer}",
        )
        return self.sliding_layers.index(layer)

    def host_blocks(self, max_tokens: int) -> int:
        """Host blocks `P` needed for sequences of some length, in whole coarsest units.

        Args:
          max_tokens: capacity of a sequence in tokens.

        Returns:
          A multiple of 8; 0 if everything fits into the resident window.
        """
        blocks = host_tokens(self, max_tokens) // BLOCK_TOKENS
        return -(-blocks // _BLOCKS_PER_COARSEST) * _BLOCKS_PER_COARSEST


def host_tokens(layout: KVLayout, lengths: Any) -> Any:
    """Tokens of a sequence that are selectable on the host, after `lengths` tokens.

    Args:
      layout: the cache's layout.
      lengths: an int, or an integer array of any shape.

    Returns:
      The same type; always a multiple of 16.
    """
    beyond = (lengths - layout.sink_tokens - layout.recent_tokens) // BLOCK_TOKENS
    if isinstance(lengths, int | np.integer):
        return BLOCK_TOKENS * max(0, int(beyond))
    return BLOCK_TOKENS * jnp.maximum(0, beyond)


def num_units(num_blocks: int) -> int:
    """Summary rows `U` of all four granularities together."""
    return sum(num_blocks * BLOCK_TOKENS // g for g in GRANULARITIES_TOKENS)
