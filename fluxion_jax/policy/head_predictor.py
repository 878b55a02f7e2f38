"""The head-property predictor: one small network, shared by all heads of all layers.

From the features of a query head and the tolerance it predicts whether the head streams (the
resident window is enough) and, if not, its budget at every granularity:

    log2(budget(g) / host_tokens) = base + growth * log2(g / 16)

The paper has budgets grow linearly in log2 of the block length. On real heads the ratio of
successive budgets varies less than their difference, so the line is drawn in log2 of the budget. It
is a share of the host's tokens, so that beyond the lengths of the calibration an error is towards
reading too much. The tolerance is an input, not a constant of the training.

A learned vector per layer and head lets the network know what is constant about a head; so it can
do no worse than a table of budgets per head. Axes: N query heads, F features.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import pallas_kernels
from fluxion_jax.policy.features import NUM_FEATURES

HIDDEN = (256, 256, 128)
"""Widths of the hidden layers; with the input about 0.11 million weights (paper: 0.112)."""
HEAD_VECTOR = 8
"""Entries of what is learned of each layer and head."""
# Standardised features beyond this are outliers that the network never met.
_CLIP = 6.0


class Statistics(nnx.Variable[Any]):
    """Mean or deviation of the features: stored with the weights, never trained."""


class HeadNeeds(NamedTuple):
    """What heads need, each float32 `[..., N]`.

    Attributes:
      streaming: logit; positive where the resident window is likely enough.
      base: log2 of the budget at granularity 16 over the host's tokens.
      growth: what is added per doubling of the granularity, not negative.
    """

    streaming: jax.Array
    base: jax.Array
    growth: jax.Array

    def log2_fraction(self, doublings: jax.Array | np.ndarray) -> jax.Array:
        """log2 of the budget over the host's tokens, `[..., N, D]` for `[D]` doublings of 16."""
        return self.base[..., None] + self.growth[..., None] * doublings


class HeadPredictor(nnx.Module):
    """The network; see the module's text."""

    def __init__(self, num_layers: int, num_heads: int, *, rngs: nnx.Rngs) -> None:
        """Creates a randomly initialised predictor.

        Args:
          num_layers: layers of the model, sliding ones included.
          num_heads: query heads N of a layer.
          rngs: source of the initial parameters.
        """
        sizes = (NUM_FEATURES + 1 + HEAD_VECTOR, *HIDDEN)
        self.heads = nnx.Param(
            0.1 * jax.random.normal(rngs.params(), (num_layers, num_heads, HEAD_VECTOR))
        )
        self.hidden = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(sizes)])
        self.out = nnx.Linear(sizes[-1], 3, rngs=rngs)
        self.mean = Statistics(jnp.zeros((NUM_FEATURES,)))
        self.deviation = Statistics(jnp.ones((NUM_FEATURES,)))

    def __call__(
        self,
        features: jax.Array,
        head_vectors: jax.Array,
        tolerance: jax.Array,
    ) -> HeadNeeds:
        """Predicts the needs of heads.

        Args:
          features: float32 `[..., F]`.
          head_vectors: float32 `[..., 8]`, rows of `heads`; broadcast against `features`.
          tolerance: float32, of the output error; broadcast against `[...]`.
        """
        shape = features.shape[:-1]
        inputs = (
            standardised(features, self.mean[...], self.deviation[...]),
            jnp.broadcast_to(jnp.log2(tolerance), shape)[..., None],
            jnp.broadcast_to(head_vectors, (*shape, HEAD_VECTOR)),
        )
        x = jnp.concatenate([jnp.moveaxis(y, -1, 0) for y in inputs])
        x = self.hidden_layers(x.reshape(len(x), -1), implementation="xla")
        bias: Any = self.out.bias
        out = x @ self.out.kernel[...] + bias[...]
        return as_needs(*jnp.moveaxis(out.reshape(*shape, 3), -1, 0))

    def hidden_layers(
        self, inputs: jax.Array, *, implementation: pallas_kernels.Implementation = None
    ) -> jax.Array:
        """All layers but the last.

        Args:
          inputs: float32 `[I, R]` of R heads: standardised features, log2 of the tolerance, and the
            vector of the layer and head. Inputs first, for neighbouring threads of a GPU then
            write the same one for other heads.
          implementation: of `pallas_kernels.dense_layer`; only "xla" can be differentiated.

        Returns:
          float32 `[R, 128]`.
        """
        x = inputs
        for i, layer in enumerate(self.hidden):
            bias: Any = layer.bias
            x = pallas_kernels.dense_layer(
                x,
                layer.kernel[...],
                bias[...],
                inputs_first=i == 0,
                implementation=implementation,
            )
        return x


def standardised(features: jax.Array, mean: jax.Array, deviation: jax.Array) -> jax.Array:
    """Features as the network takes them; what is not a number stays so."""
    standard = (features - mean) / deviation
    # A GPU's minimum of a number and none is the number.
    return jnp.where(standard == standard, jnp.clip(standard, -_CLIP, _CLIP), standard)


def as_needs(streaming: jax.Array, base: jax.Array, growth: jax.Array) -> HeadNeeds:
    """What the last layer's three numbers of each head say."""
    # softplus, without its branches.
    positive = jnp.maximum(growth, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(growth)))
    return HeadNeeds(streaming, base, positive)
