"""A real model's queries, keys and values over a long real text, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx

from fluxion_jax.models.decoder import Decoder, DecoderLayer


class Captured(NamedTuple):
    """What one layer attends with, float32, after RoPE and unscaled.

    Attributes:
      q: `[T, N, H]`, the queries asked for.
      k: `[K, S, H]`.
      v: `[K, S, H]`.
      scale: factor of the scores.
    """

    q: npt.NDArray[np.float32]
    k: npt.NDArray[np.float32]
    v: npt.NDArray[np.float32]
    scale: float


def capture(
    model: Decoder, tokens: npt.NDArray[np.int32], positions: npt.NDArray[np.int64]
) -> Iterator[Captured]:
    """Runs the model's dense forward pass and yields each layer's attention inputs in turn.

    Args:
      model: a decoder; its sliding-window layers are gone through, but not captured.
      tokens: int32 `[S]`.
      positions: int `[T]`, the positions whose queries are wanted.
    """
    x = model._embed(jnp.asarray(tokens)[None])
    for layer in model.layers:
        x, q, k, v = _through(layer, x)
        if layer.attention.sliding_window is not None:
            continue
        yield Captured(
            q=np.asarray(q[0, positions], np.float32),
            k=np.asarray(jnp.moveaxis(k[0], 1, 0), np.float32),
            v=np.asarray(jnp.moveaxis(v[0], 1, 0), np.float32),
            scale=layer.attention.scale,
        )


@nnx.jit
def _through(
    layer: DecoderLayer, x: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    normed = layer.attention_norm(x)
    positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    projected = layer.attention._project(normed, positions)
    return layer.finish(x, layer.attention(normed)), *projected
