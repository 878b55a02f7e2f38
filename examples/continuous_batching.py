"""Continuous batching: when a sequence finishes, the next request takes its slot.

The batch keeps its shape, so nothing is compiled again; slots are reset and prefilled while the
other rows of the cache stay as they are.
"""

from __future__ import annotations

from collections import deque

import numpy as np

import fluxion_jax as fx
from fluxion_jax.models import Decoder, ModelConfig

SLOTS, CHUNK = 2, 8
model = Decoder.random(ModelConfig.tiny_llama())
rng = np.random.default_rng(0)
# Each request: its prompt and how many tokens it wants.
requests = {
    number: (rng.integers(0, 256, length).tolist(), wanted)
    for number, (length, wanted) in enumerate([(350, 8), (30, 24), (90, 16), (400, 8), (12, 16)])
}
waiting = deque(requests)
running: dict[int, int] = {}
answers: dict[int, list[int]] = {number: [] for number in requests}
cache = fx.HostKV.allocate(model.config.kv_layout("float32"), SLOTS, max_tokens=512)

while waiting or running:
    for slot in range(SLOTS):
        if slot not in running and waiting:
            number = running[slot] = waiting.popleft()
            cache = cache.reset([slot])
            # Only this row takes part in the prefill; all but the last token of its prompt.
            cache.active = cache.active.at[:].set(False).at[slot].set(True)
            rows = [[0]] * SLOTS
            rows[slot] = requests[number][0][:-1]
            fx.prefill(model, rows, cache, progress=False)
    cache.active = cache.active.at[:].set(False)
    for slot in running:
        cache.active = cache.active.at[slot].set(True)
    following = [[0]] * SLOTS
    for slot, number in running.items():
        following[slot] = [[requests[number][0][-1], *answers[number]][-1]]
    result = fx.generate(
        model, following, cache=cache, max_new_tokens=CHUNK, policy="fixed:16:0.05", progress=False
    )
    for slot, number in list(running.items()):
        answers[number] += result.tokens[slot].tolist()
        if len(answers[number]) >= requests[number][1]:
            print(f"request {number} finished in slot {slot}: {answers[number]}")
            del running[slot]

for number, (prompt, wanted) in requests.items():
    alone = fx.generate(
        model, prompt, max_new_tokens=wanted, policy="fixed:16:0.05", progress=False
    )
    assert answers[number] == alone.tokens[0].tolist(), number
