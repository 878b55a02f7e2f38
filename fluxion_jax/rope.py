"""Rotary position embedding: the frequencies of a model and their application.

Scaling variants differ only in what they divide the frequencies by, so a `Rope` is a base and one
divisor per frequency.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from fluxion_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Rope:
    """The rotary frequencies `theta ** (-2 i / H) / divisors[i]`, for i in [0, H / 2).

    Attributes:
      theta: base of the frequencies; 10000 is the value of the RoFormer paper.
      divisors: empty for plain RoPE, one number for linear scaling, or `H / 2` numbers.
    """

    theta: float = 10_000.0
    divisors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.theta > 0:
            raise ConfigError(
                f"expected a RoPE theta above 0, got {self.theta}; "
                "take `rope_theta` from the model's configuration"
            )
        if not all(math.isfinite(d) and d > 0 for d in self.divisors):
            raise ConfigError(
                f"expected finite RoPE divisors above 0, got {self.divisors}; "
                "check `rope_scaling` in the model's configuration"
            )

    @classmethod
    def linear(cls, theta: float, factor: float) -> Rope:
        """Position interpolation: every frequency divided by `factor`."""
        return cls(theta, (float(factor),))

    @classmethod
    def llama3(
        cls,
        theta: float,
        head_dim: int,
        *,
        factor: float,
        low_freq_factor: float,
        high_freq_factor: float,
        original_context_tokens: int,
    ) -> Rope:
        """Llama 3.1 scaling: long wavelengths divided by `factor`, short ones kept, smooth between.

        Args:
          theta: base of the frequencies.
          head_dim: head size H.
          factor: divisor of the long wavelengths.
          low_freq_factor: wavelengths above `original_context_tokens / low_freq_factor` are long.
          high_freq_factor: those below `original_context_tokens / high_freq_factor` are short.
          original_context_tokens: context length in tokens the model was first trained for.

        Raises:
          ConfigError: unless `high_freq_factor > low_freq_factor`.
        """
        if not high_freq_factor > low_freq_factor:
            raise ConfigError(
                "expected high_freq_factor above low_freq_factor in llama3 RoPE scaling, got "
                f"{high_freq_factor} and {low_freq_factor}; check `rope_scaling`"
            )
        wavelengths = 2 * np.pi / cls(theta).frequencies(head_dim).astype(np.float64)
        smooth = (original_context_tokens / wavelengths - low_freq_factor) / (
            high_freq_factor - low_freq_factor
        )
        smooth = np.clip(smooth, 0.0, 1.0)
        divisors = 1.0 / ((1.0 - smooth) / factor + smooth)
        return cls(theta, tuple(float(d) for d in divisors))

    def frequencies(self, head_dim: int) -> np.ndarray:
        """float32 `[H / 2]`, radians per position."""
        if len(self.divisors) not in (0, 1, head_dim // 2):
            raise ConfigError(
                f"expected 0, 1 or {head_dim // 2} RoPE divisors for head size {head_dim}, "
                f"got {len(self.divisors)}; build the Rope for this head size"
            )
        exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
        frequencies = self.theta**-exponents
        if self.divisors:
            frequencies = frequencies / np.asarray(self.divisors, np.float64)
        return frequencies.astype(np.float32)

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Rotates queries or keys to their positions.

        The two halves of the head pair up (as in Hugging Face checkpoints), not neighbours.

        Args:
          x: float `[B, T, N, H]`.
          positions: int32 `[B, T]`.

        Returns:
          `[B, T, N, H]` in the dtype of `x`; angles and products are float32.
        """
        frequencies = jnp.asarray(self.frequencies(x.shape[-1]))
        angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return rotated.astype(x.dtype)
