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

# Texts of similar length share a compiled program.
_PADDED_TOKENS = 512


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
    length = len(tokens)
    # What is behind a token does not change it.
    x = model._embed(jnp.asarray(np.pad(tokens, (0, -length % _PADDED_TOKENS)))[None])
    for layer in model.layers:
        x, q, k, v = _through(layer, x)
        if layer.attention.sliding_window is not None:
            continue
        yield Captured(
            q=np.asarray(q[0], np.float32)[positions],
            k=np.moveaxis(np.asarray(k[0], np.float32)[:length], 1, 0),
            v=np.moveaxis(np.asarray(v[0], np.float32)[:length], 1, 0),
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
