"""Tasks that copy from far away: a value out of a long JSON object, the rest of a function."""

from __future__ import annotations

import random

from fluxion_jax.evaluation.needles import plant
from fluxion_jax.evaluation.samples import Draft, Request, Task
from fluxion_jax.evaluation.words import names, uuids

_OPERATORS = ("+", "-", "*", "//", "%")


def _key_value(request: Request) -> Draft:
    keys, values = uuids(request.rng, request.size), uuids(request.rng, request.size)
    pairs = [f'"{k}": "{v}"' for k, v in zip(keys, values, strict=True)]
    text, depth = plant(request.rng, pairs[1:], pairs[:1], request.depth_fraction)
    prompt = (
        "Look up the value of a key in the JSON object below.\n{"
        + ",\n ".join(text)
        + f'}}\nQuestion: What is the value of the key "{keys[0]}"?\n'
        + f'Answer: The value of the key "{keys[0]}" is "'
    )
    return Draft(prompt, (values[0],), depth)


def _function(rng: random.Random, name: str) -> tuple[str, str]:
    """A function's first line and its body."""
    terms = [f"x {rng.choice(_OPERATORS)} {rng.randrange(10, 1000)}" for _ in range(3)]
    body = f"    x = {terms[0]}\n    x = {terms[1]}\n    return {terms[2]}"
    return f"def {name}(x):\n", body


def _completion(request: Request) -> Draft:
    rng = request.rng
    called = [name.replace("-", "_") for name in names(rng, request.size + 1)]
    functions = [_function(rng, name) for name in called]
    sources = [head + body + "\n" for head, body in functions]
    text, depth = plant(rng, sources[1:], sources[:1], request.depth_fraction)
    head, body = functions[0]
    prompt = "# first.py\n" + "\n".join(text) + f"\n# second.py, the same function again\n{head}"
    return Draft(prompt, (body,), depth)


COPYING_TASKS = (
    Task("key_value", _key_value, 64, "all", has_depth=True),
    Task("code_completion", _completion, 64, "edit_similarity_of_lines", has_depth=True),
)
