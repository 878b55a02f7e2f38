"""A Linen decoder whose layers run in `nn.scan`, attending through the bridge to NNX.

`nnx.bridge.ToLinen` makes the attention module one of Linen's; `nnx_method` names the way to
attend. `nn.scan` stacks the layers' parameters, so a layer is compiled once however many there are,
and the cache is stacked likewise (`stacked=True`) and carried from layer to layer, in place.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import fluxion_jax as fx
from fluxion_jax.modules import Attention
from fluxion_jax.policy import parse_split

LAYERS, WIDTH, VOCABULARY = 6, 64, 256


class Layer(nn.Module):
    def setup(self) -> None:
        self.norm = nn.RMSNorm()
        self.attention = nnx.bridge.ToLinen(Attention, args=(WIDTH, 4, 2, 16))
        self.feed_forward = nn.Dense(WIDTH)

    def finish(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        x = x + attended
        return x + nn.gelu(self.feed_forward(x))

    def dense(self, x: jax.Array, index: jax.Array) -> tuple:
        return self.finish(x, self.attention(self.norm(x))), None

    def prefill(self, carry: tuple, index: jax.Array, count: jax.Array) -> tuple:
        x, cache = carry
        attended, cache = self.attention(self.norm(x), count, cache, index, nnx_method="prefill")
        return (self.finish(x, attended), cache), None

    def decode(self, carry: tuple, index: jax.Array, policy: fx.Policy, split: Any) -> tuple:
        x, cache = carry
        attended, cache, stats = self.attention(
            self.norm(x), cache, index, policy, split=split, nnx_method="decode"
        )
        return (self.finish(x, attended), cache), stats


def over_layers(shared: int) -> dict[str, Any]:
    """How `nn.scan` runs a method: one index a layer, and `shared` arguments for all of them."""
    return {
        "variable_axes": {"params": 0},
        "split_rngs": {"params": True},
        "in_axes": (0, *[nn.broadcast] * shared),
        # Linen's check would take an operation that writes the cache for a use of its constants.
        "check_constancy_invariants": False,
    }


class Decoder(nn.Module):
    def setup(self) -> None:
        self.tokens = nn.Embed(VOCABULARY, WIDTH)
        methods = {"dense": over_layers(0), "prefill": over_layers(1), "decode": over_layers(2)}
        self.layers = nn.scan(Layer, methods=methods)()

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of every token, without a cache."""
        x, _ = self.layers.dense(self.tokens(tokens), jnp.arange(LAYERS))
        return self.tokens.attend(x)

    def prefill(self, tokens: jax.Array, cache: fx.HostKV) -> fx.HostKV:
        count = jnp.full((tokens.shape[0],), tokens.shape[1], jnp.int32)
        carry = (self.tokens(tokens), cache)
        (_, after), _ = self.layers.prefill(carry, jnp.arange(LAYERS), count)
        return after.advance(count).undo_if_failed(cache)

    def decode(self, token: jax.Array, cache: fx.HostKV, policy: fx.Policy, split: Any) -> tuple:
        carry = (self.tokens(token[:, None]), cache)
        (x, cache), stats = self.layers.decode(carry, jnp.arange(LAYERS), policy, split)
        return self.tokens.attend(x[:, 0]), cache.advance(), stats


model = Decoder()
tokens = np.random.default_rng(0).integers(0, VOCABULARY, (1, 700)).astype(np.int32)
variables = model.init(jax.random.key(0), jnp.asarray(tokens[:, :8]))
layout = fx.KVLayout(LAYERS, num_kv_heads=2, head_dim=16, dtype="float32")
cache = fx.HostKV.allocate(layout, batch=1, max_tokens=1024, stacked=True)


@fx.jit
def prefill(cache: fx.HostKV, variables: Any, tokens: jax.Array) -> fx.HostKV:
    return model.apply(variables, tokens, cache, method="prefill")


@fx.jit
def decode(
    cache: fx.HostKV, variables: Any, token: jax.Array, policy: fx.Policy, split: Any
) -> tuple:
    return model.apply(variables, token, cache, policy, split, method="decode")


place = cache.k[0].unsafe_buffer_pointer()
cache = prefill(cache, variables, jnp.asarray(tokens[:, :-8]))
for token in tokens[:, -8:].T:
    logits, cache, stats = decode(
        cache, variables, jnp.asarray(token), fx.full(), parse_split("host")
    )
cache.check()
assert cache.k[0].unsafe_buffer_pointer() == place
assert stats.host_blocks.shape[0] == LAYERS
dense = model.apply(variables, jnp.asarray(tokens))[:, -1]
assert np.abs(logits - dense).max() < 1e-4, np.abs(logits - dense).max()
print(cache)
