"""Bring your own prefill: keys and values from anywhere go into the cache as arrays.

Here the model's dense path computes them, as a prefill engine or a saved KV cache of another
library would; decoding goes on under a policy.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx

import fluxion_jax as fx
from fluxion_jax.models import Decoder, ModelConfig

model = Decoder.random(ModelConfig.tiny_llama())
prompt = np.random.default_rng(0).integers(0, 256, 400)


@nnx.jit
def keys_and_values(model: Decoder, tokens):
    """Per layer `[B, S, K, H]`; keys after RoPE and unscaled, as a cache keeps them."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x = model.embedding[...][tokens]
    k, v = [], []
    for layer in model.layers:
        attention, normed = layer.attention, layer.attention_norm(x)
        heads = (*tokens.shape, attention.num_kv_heads, attention.head_dim)
        k.append(attention.rope.rotate(attention.k(normed).reshape(heads), positions))
        v.append(attention.v(normed).reshape(heads))
        x = layer.finish(x, attention(normed))
    return k, v


# All but the last token, which is the first to be decoded.
k, v = keys_and_values(model, jnp.asarray(prompt[None, :-1]))
layout = model.config.kv_layout("float32")
cache = fx.HostKV.from_arrays(layout, k, v, lengths=[len(prompt) - 1], max_tokens=512)
print(cache)
options = {"policy": "fixed:16:0.05", "max_new_tokens": 8, "progress": False}
result = fx.generate(model, [prompt[-1:].tolist()], cache=cache, **options)
print(result.tokens[0].tolist())

ours = fx.generate(model, prompt.tolist(), **options)
assert np.array_equal(result.tokens[0], ours.tokens[0])
