"""Ten lines add hybrid attention to an existing Flax NNX decoder, and generate.

The decoder above the line knows nothing of this library, and stays as it is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

import fluxion_jax as fx


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.RMSNorm(64, rngs=rngs)
        self.qkv = nnx.LinearGeneral(64, (3, 4, 16), rngs=rngs)
        self.out = nnx.LinearGeneral((4, 16), 64, axis=(-2, -1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = jnp.moveaxis(self.qkv(self.norm(x)), 2, 0)
        return x + self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True))


class SmallDecoder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.tokens = nnx.Embed(256, 64, rngs=rngs)
        self.positions = nnx.Embed(4096, 64, rngs=rngs)
        self.layers = nnx.List([Layer(rngs) for _ in range(2)])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.tokens.attend(x)


decoder = SmallDecoder(nnx.Rngs(0))
# ------------------------------------------------------------------------------ the ten lines
model = fx.adapt(
    decoder,
    embed=lambda decoder, tokens, positions: decoder.tokens(tokens) + decoder.positions(positions),
    layers=lambda decoder: decoder.layers,
    qkv=lambda layer, x, positions: tuple(jnp.moveaxis(layer.qkv(layer.norm(x)), 2, 0)),
    finish=lambda layer, x, attended: x + layer.out(attended),
    logits=lambda decoder, x: decoder.tokens.attend(x),
)
result = fx.generate(model, list(range(250)) * 6, policy="fixed:16:0.05", max_new_tokens=16)
print(result.tokens[0].tolist(), result.stats, sep="\n")
