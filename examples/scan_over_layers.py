"""A decoder whose layers run in `nnx.scan`, the stacked KV cache carried from layer to layer.

The layers' parameters are stacked, as `nnx.vmap` makes them, so a layer is compiled once however
many there are. The cache is stacked likewise (`stacked=True`) and stays where it is: no step copies
it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import fluxion_jax as fx
from fluxion_jax.modules import Attention
from fluxion_jax.policy import parse_split

LAYERS, WIDTH, VOCABULARY = 6, 64, 256


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = Attention(WIDTH, 4, 2, 16, rngs=rngs)
        self.feed_forward = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def finish(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        x = x + attended
        return x + nnx.gelu(self.feed_forward(x))


class Decoder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.tokens = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        make = nnx.split_rngs(splits=LAYERS)(nnx.vmap(Layer, in_axes=0, out_axes=0))
        self.layers = make(rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of every token, without a cache."""

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer: Layer, x: jax.Array) -> jax.Array:
            return layer.finish(x, layer.attention(layer.norm(x)))

        return self.tokens.attend(run(self.layers, self.tokens(tokens)))

    def prefill(self, tokens: jax.Array, cache: fx.HostKV) -> fx.HostKV:
        count = jnp.full((tokens.shape[0],), tokens.shape[1], jnp.int32)

        @nnx.scan(in_axes=(0, nnx.Carry, 0), out_axes=nnx.Carry)
        def run(layer: Layer, carry: tuple, index: jax.Array) -> tuple:
            x, cache = carry
            attended, cache = layer.attention.prefill(layer.norm(x), count, cache, index)
            return layer.finish(x, attended), cache

        _, after = run(self.layers, (self.tokens(tokens), cache), jnp.arange(LAYERS))
        return after.advance(count).undo_if_failed(cache)

    def decode(self, token: jax.Array, cache: fx.HostKV, policy: fx.Policy, split: object) -> tuple:
        @nnx.scan(in_axes=(0, nnx.Carry, 0), out_axes=nnx.Carry)
        def run(layer: Layer, carry: tuple, index: jax.Array) -> tuple:
            x, cache = carry
            attended, cache, _ = layer.attention.decode(
                layer.norm(x), cache, index, policy, split=split
            )
            return layer.finish(x, attended), cache

        x, cache = run(self.layers, (self.tokens(token[:, None]), cache), jnp.arange(LAYERS))
        return self.tokens.attend(x[:, 0]), cache.advance()


graph, parameters = nnx.split(Decoder(nnx.Rngs(0)))
layout = fx.KVLayout(LAYERS, num_kv_heads=2, head_dim=16, dtype="float32")
cache = fx.HostKV.allocate(layout, batch=1, max_tokens=1024, stacked=True)


@fx.jit
def prefill(cache: fx.HostKV, parameters: nnx.State, tokens: jax.Array) -> fx.HostKV:
    return nnx.merge(graph, parameters).prefill(tokens, cache)


@fx.jit
def decode(
    cache: fx.HostKV, parameters: nnx.State, token: jax.Array, policy: fx.Policy, split: object
) -> tuple:
    return nnx.merge(graph, parameters).decode(token, cache, policy, split)


tokens = np.random.default_rng(0).integers(0, VOCABULARY, (1, 700)).astype(np.int32)
place = cache.k[0].unsafe_buffer_pointer()
cache = prefill(cache, parameters, jnp.asarray(tokens[:, :-8]))
for token in tokens[:, -8:].T:
    logits, cache = decode(cache, parameters, jnp.asarray(token), fx.full(), parse_split("host"))
cache.check()
assert cache.k[0].unsafe_buffer_pointer() == place
dense = nnx.merge(graph, parameters)(jnp.asarray(tokens))[:, -1]
assert np.abs(logits - dense).max() < 1e-4, np.abs(logits - dense).max()
print(cache)
