"""Ways to draw the next token: greedy, temperature, top-k, top-p, and seeds that repeat.

How to draw is data: all of these run in the one program that the first of them compiled. A seed
gives the same tokens again, also when a generation is cut into two.
"""

from __future__ import annotations

import numpy as np

import fluxion_jax as fx
from fluxion_jax.models import Decoder, ModelConfig

model = Decoder.random(ModelConfig.tiny_llama())
prompt = list(range(200)) * 2
cache = fx.HostKV.allocate(model.config.kv_layout("float32"), batch=1, max_tokens=512)
fx.prefill(model, prompt[:-1], cache, progress=False)


def answer(sampling: fx.Sampling, seed: int = 0, tokens: int = 12) -> fx.Result:
    return fx.generate(
        model,
        prompt[-1:],
        cache=cache.fork(),
        policy="fixed:16:0.05",
        max_new_tokens=tokens,
        sampling=sampling,
        seed=seed,
        progress=False,
    )


greedy = answer(fx.greedy())
print(fx.greedy(), greedy.tokens[0].tolist())
for sampling in (
    fx.top_p(1.0, temperature=0.7),
    fx.top_p(1.0, top_k=40),
    fx.top_p(0.9, temperature=0.8, top_k=40),
):
    result = answer(sampling, seed=7)
    print(sampling, result.tokens[0].tolist())
    assert result.stats.compile_s == 0

# One likeliest token, or a nucleus that one token fills, is greedy.
assert np.array_equal(answer(fx.top_p(1.0, top_k=1)).tokens[0], greedy.tokens[0])
assert np.array_equal(answer(fx.top_p(1e-6)).tokens[0], greedy.tokens[0])

hot = fx.top_p(0.95, temperature=1.5)
whole = answer(hot, seed=7).tokens[0]
assert np.array_equal(answer(hot, seed=7).tokens[0], whole)
assert not np.array_equal(answer(hot, seed=8).tokens[0], whole)

first = answer(hot, seed=7, tokens=5)
rest = fx.generate(
    model,
    first.tokens[0][-1:].tolist(),
    cache=first.cache,
    policy="fixed:16:0.05",
    max_new_tokens=7,
    sampling=hot,
    seed=7,
    progress=False,
)
assert np.array_equal(np.concatenate([first.tokens[0], rest.tokens[0]]), whole)
