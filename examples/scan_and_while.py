"""Decode loops inside of one program: `lax.scan`, `nnx.scan`, and `while_loop` that stops early.

The cache is part of the carry and stays where it is; nothing of it is copied.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import fluxion_jax as fx
from fluxion_jax.models import Decoder, ModelConfig
from fluxion_jax.policy import split_at

STEPS = 12
model = Decoder.random(ModelConfig.tiny_llama())
graph, params = nnx.split(model)
prompts = [list(range(200)) * 2, [5, 6, 7]]
policy, split = fx.fixed(16, 0.05), split_at(1.0)


def one_step(model, tokens, cache, policy, split):
    logits, cache, _ = model.decode_step(tokens, cache, policy, split=split)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache


@fx.jit
def with_scan(params, tokens, cache, policy, split):
    def body(carry, _):
        tokens, cache = one_step(nnx.merge(graph, params), *carry, policy, split)
        return (tokens, cache), tokens

    (_, cache), generated = jax.lax.scan(body, (tokens, cache), None, length=STEPS)
    return generated.T, cache


@fx.jit
def with_nnx_scan(params, tokens, cache, policy, split):
    @nnx.scan(in_axes=(nnx.Carry, None), out_axes=(nnx.Carry, 0), length=STEPS)
    def run(carry, model):
        tokens, cache = one_step(model, *carry, policy, split)
        return (tokens, cache), tokens

    (_, cache), generated = run((tokens, cache), nnx.merge(graph, params))
    return generated.T, cache


@fx.jit
def with_while(params, tokens, cache, policy, split, stop_token):
    def unfinished(carry):
        i, _, cache, _ = carry
        return (i < STEPS) & cache.active.any() & (cache.status[0] == 0)

    def body(carry):
        i, tokens, cache, generated = carry
        rows = cache.active  # a row that has stopped takes no part and costs nothing
        tokens, cache = one_step(nnx.merge(graph, params), tokens, cache, policy, split)
        generated = generated.at[:, i].set(jnp.where(rows, tokens, -1))
        cache = cache.replace(active=rows & (tokens != stop_token))
        return i + 1, tokens, cache, generated

    nothing = jnp.full((tokens.shape[0], STEPS), -1, jnp.int32)
    steps, _, cache, generated = jax.lax.while_loop(unfinished, body, (0, tokens, cache, nothing))
    return generated, steps, cache


cache = fx.HostKV.allocate(model.config.kv_layout("float32"), batch=2, max_tokens=512)
logits = fx.prefill(model, prompts, cache, progress=False)
first = jnp.argmax(jnp.asarray(logits), axis=-1).astype(jnp.int32)

expected, scanned = with_scan(params, first, cache.fork(), policy, split)
scanned.check()
print("lax.scan  ", expected.tolist())
generated, scanned = with_nnx_scan(params, first, cache.fork(), policy, split)
scanned.check()
assert np.array_equal(generated, expected)

# Row 0 stops at a token that it generates, row 1 goes on until there are enough.
stop_token = int(expected[0, 3])
generated, steps, finished = with_while(params, first, cache.fork(), policy, split, stop_token)
finished.check()
print("while_loop", generated.tolist(), "after", int(steps), "steps")
for row in range(2):
    kept = [t for t in generated[row].tolist() if t >= 0]
    assert kept == expected[row, : len(kept)].tolist()
    assert len(kept) == STEPS or kept[-1] == stop_token
