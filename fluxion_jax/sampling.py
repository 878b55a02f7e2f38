"""Sampling: how the next token is drawn from logits, as data, so changing it does not recompile."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fluxion_jax.errors import ConfigError, require_number

# More than any vocabulary.
_EVERY_TOKEN = np.asarray(np.iinfo(np.int32).max, np.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """Temperature, nucleus and count; build it with `greedy` or `top_p`.

    Attributes:
      temperature: float32 scalar; 0 takes the most likely token.
      top_p: float32 scalar, probability mass of the nucleus, in (0, 1].
      top_k: int32 scalar, how many of the likeliest tokens may be drawn at all.

    Example:
      >>> import fluxion_jax as fx
      >>> print(fx.top_p(0.9, temperature=0.7, top_k=40))
      top_p(0.9, temperature=0.7, top_k=40)
    """

    temperature: jax.Array | np.ndarray
    top_p: jax.Array | np.ndarray
    top_k: jax.Array | np.ndarray

    def __str__(self) -> str:
        if isinstance(self.temperature, jax.core.Tracer):
            return "a traced sampling"
        if not self.temperature > 0:
            return "greedy()"
        top_k = "" if int(self.top_k) >= _EVERY_TOKEN else f", top_k={int(self.top_k)}"
        return f"top_p({float(self.top_p):.6g}, temperature={float(self.temperature):.6g}{top_k})"


def greedy() -> Sampling:
    """Always the most likely token, ties to the lowest id.

    Example:
      >>> import fluxion_jax as fx
      >>> print(fx.greedy())
      greedy()
    """
    return Sampling(np.asarray(0.0, np.float32), np.asarray(1.0, np.float32), _EVERY_TOKEN)


def top_p(p: float = 0.9, *, temperature: float = 1.0, top_k: int | None = None) -> Sampling:
    """Draws from the smallest set of tokens whose probability reaches `p`.

    Args:
      p: mass of the nucleus in (0, 1]; 0.9 is the customary default, 1 takes all.
      top_k: draw from so many of the likeliest tokens only; the nucleus is then one of these,
        by their probabilities among themselves. None for all.
      temperature: divides the logits; above 0.

    Returns:
      The sampling; its numbers are data, so another one compiles nothing.

    Raises:
      ConfigError: a value is out of range.

    Example:
      >>> import fluxion_jax as fx
      >>> print(fx.top_p(0.95))
      top_p(0.95, temperature=1)
    """
    require_number("a top-p in (0, 1]", p, "0.9 is customary")
    require_number("a temperature > 0", temperature, "use greedy() for 0")
    if not 0.0 < p <= 1.0:
        raise ConfigError(f"expected top-p in (0, 1], got {p}")
    if not temperature > 0.0:
        raise ConfigError(f"expected a temperature > 0, got {temperature}; use greedy() for 0")
    wanted: Any = int(_EVERY_TOKEN) if top_k is None else top_k
    if isinstance(wanted, bool) or not isinstance(wanted, int | np.integer) or wanted < 1:
        raise ConfigError(f"expected an integer top_k >= 1 or None, got {top_k!r}")
    count = np.asarray(min(wanted, int(_EVERY_TOKEN)), np.int32)
    return Sampling(np.asarray(temperature, np.float32), np.asarray(p, np.float32), count)


def sample(
    logits: jax.Array, sampling: Sampling, key: jax.Array, positions: jax.Array
) -> jax.Array:
    """Draws one token per row.

    Args:
      logits: float32 `[B, V]`.
      sampling: how.
      key: PRNG key of the generation.
      positions: int32 `[B]`, length of each sequence; together with the row it makes the draw
        independent of how a generation is cut into compiled chunks.

    Returns:
      int32 `[B]`.
    """

    def draw() -> jax.Array:
        def row_key(row: jax.Array, position: jax.Array) -> jax.Array:
            return jax.random.fold_in(jax.random.fold_in(key, row), position)

        keys = jax.vmap(row_key)(jnp.arange(logits.shape[0]), positions)
        scaled = logits / jnp.maximum(sampling.temperature, 1e-6)
        order = jnp.argsort(-scaled, axis=-1)
        counted = jnp.arange(logits.shape[-1]) < sampling.top_k
        likeliest = jnp.take_along_axis(scaled, order, axis=-1)
        ranked = jax.nn.softmax(jnp.where(counted, likeliest, -jnp.inf), axis=-1)
        # The token that crosses the mass belongs to the nucleus, so the first one always does.
        inside = jnp.cumsum(ranked, axis=-1) - ranked < sampling.top_p
        rank = jax.vmap(jax.random.categorical)(keys, jnp.where(inside, jnp.log(ranked), -jnp.inf))
        return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)

    def most_likely() -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return jax.lax.cond(sampling.temperature > 0, draw, most_likely)
