"""A decode loop in Python: one compiled step, called again and again.

The step takes and returns the cache; `fluxion_jax.jit` donates it, so it is updated in place.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

import fluxion_jax as fx
from fluxion_jax.models import Decoder, ModelConfig
from fluxion_jax.policy import split_at

model = Decoder.random(ModelConfig.tiny_llama())
graph, params = nnx.split(model)
prompts = [list(range(200)) * 2, [5, 6, 7]]
cache = fx.HostKV.allocate(model.config.kv_layout("float32"), batch=2, max_tokens=512)


@fx.jit
def step(params, tokens, cache, policy, split):
    logits, cache, _ = nnx.merge(graph, params).decode_step(tokens, cache, policy, split=split)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache


logits = fx.prefill(model, prompts, cache, progress=False)
tokens = jnp.argmax(jnp.asarray(logits), axis=-1).astype(jnp.int32)
policy, split = fx.fixed(16, 0.05), split_at(1.0)
generated = [tokens]
for _ in range(15):
    tokens, cache = step(params, tokens, cache, policy, split)
    generated.append(tokens)
cache.check()  # an error inside a compiled step is data until somebody looks

print(jax.device_get(jnp.stack(generated, axis=1)).tolist())
print(cache)
assert step.compilations() == 1
