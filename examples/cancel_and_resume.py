"""Cancel a generation and take it up again: nothing that was generated is lost.

Ctrl-C works in the same way: `KeyboardInterrupt` comes when the running step has stopped, the cache
holds everything up to it, and the exception's `partial` is the result so far.
"""

from __future__ import annotations

import signal
import threading

import fluxion_jax as fx
from fluxion_jax.models import Decoder, ModelConfig

model = Decoder.random(ModelConfig.tiny_llama())
prompt = list(range(200)) * 2
options = {"policy": "fixed:16:0.05", "progress": False}
whole = fx.generate(model, prompt, max_new_tokens=320, **options).tokens[0].tolist()

# A consumer that has heard enough simply stops listening.
cache = fx.HostKV.allocate(model.config.kv_layout("float32"), batch=1, max_tokens=768)
heard = []
for step in fx.stream(model, prompt, cache=cache, max_new_tokens=320, **options):
    heard.append(int(step.tokens[0]))
    if len(heard) == 32:  # a compiled chunk of steps ends here, so the cache holds no more
        break
print("heard", heard[-3:])
rest = fx.generate(model, heard[-1:], cache=cache, max_new_tokens=8, **options)
assert heard + rest.tokens[0].tolist() == whole[:40]

# Ctrl-C, here pressed by a timer.
cache = cache.reset()
timer = threading.Timer(0.02, signal.raise_signal, [signal.SIGINT])
try:
    timer.start()
    done = fx.generate(model, prompt, cache=cache, max_new_tokens=320, **options)
except KeyboardInterrupt as interrupt:
    done = interrupt.partial
    print("interrupted")
finally:
    timer.join()
so_far = done.tokens[0].tolist()
fed = int(cache.lengths[0])
print(f"{len(so_far)} tokens so far, {fed} tokens in the cache")
assert so_far == whole[: len(so_far)]
following = [*prompt, *so_far][fed:]  # the last token, or what was not read of the prompt
left = 320 - len(so_far)
if left:
    rest = fx.generate(model, following, cache=cache, max_new_tokens=left, **options)
    assert so_far + rest.tokens[0].tolist() == whole
