"""A kept conversation, forked, saved, and taken up again.

A cache remembers what was read, so each turn reads only what is new. A fork continues elsewhere
from the same past; a saved cache continues in another process, bit for bit.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

import fluxion_jax as fx
from fluxion_jax.models import Decoder, ModelConfig

model = Decoder.random(ModelConfig.tiny_llama())
options = {"policy": "fixed:16:0.05", "max_new_tokens": 8, "progress": False}
cache = fx.HostKV.allocate(model.config.kv_layout("float32"), batch=1, max_tokens=640)

document = np.random.default_rng(0).integers(0, 256, 400).tolist()
first = fx.generate(model, [*document, 1, 2, 3], cache=cache, **options)
# The last token of an answer has not been fed yet: it leads the next turn.
turn = [int(first.tokens[0][-1]), 4, 5, 6]

another = cache.fork()
second = fx.generate(model, turn, cache=cache, **options)
print(cache)

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "conversation"
    another.save(path)
    print(f"saved {path.stat().st_size} bytes")
    restored = fx.HostKV.load(path)
again = fx.generate(model, turn, cache=restored, **options)
assert np.array_equal(again.tokens[0], second.tokens[0])
assert np.array_equal(again.log_probs[0], second.log_probs[0])

# Three answers to one question: the cache of one row becomes one of three.
prompts = [[turn[0], 4, 5, 6]] * 3
three = fx.generate(
    model,
    prompts,
    cache=another.fork([0, 0, 0]),
    sampling=fx.top_p(0.9, temperature=0.8),
    seed=7,
    **options,
)
for tokens in three.tokens:
    print(tokens.tolist())
