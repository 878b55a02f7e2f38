"""Needles in haystacks: the eight variants of RULER, and a pass key.

The structure is that of RULER (arXiv 2404.06654, appendix B): haystacks of repeated noise, of real
prose or of distractors; keys that are words or UUIDs; values that are numbers or UUIDs; needles at
different ones of 40 equally spaced depths. The wording and the prose are this package's own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from fluxion_jax.evaluation.samples import Draft, Request, Task
from fluxion_jax.evaluation.words import essay_sentences, names, noise_lines, numbers, uuids

NUM_DEPTHS = 40


class Needles(NamedTuple):
    """One variant.

    Attributes:
      haystack: what the needles lie in.
      key: kind of the keys.
      value: kind of the values.
      num_keys: needles with different keys in noise or prose, those asked for included.
      num_values: values of each key.
      num_queries: keys asked for.
    """

    haystack: Literal["noise", "essay", "needle"]
    key: Literal["word", "uuid"] = "word"
    value: Literal["number", "uuid"] = "number"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


VARIANTS = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", value="uuid"),
    "niah_multikey_1": Needles("essay", num_keys=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", key="uuid", value="uuid"),
    "niah_multivalue": Needles("essay", num_values=4),
    "niah_multiquery": Needles("essay", num_keys=4, num_queries=4),
}


def _build(variant: Needles) -> Callable[[Request], Draft]:
    def build(request: Request) -> Draft:
        rng = request.rng
        distractors = request.size if variant.haystack == "needle" else 0
        num_keys = variant.num_keys + distractors
        keys = uuids(rng, num_keys) if variant.key == "uuid" else names(rng, num_keys)
        draw = numbers if variant.value == "number" else uuids
        values = draw(rng, num_keys * variant.num_values)
        per_key = [
            values[i * variant.num_values : (i + 1) * variant.num_values] for i in range(num_keys)
        ]
        lines = [
            f"One of the special magic {variant.value}s for {key} is: {value}."
            for key, own in zip(keys, per_key, strict=True)
            for value in own
        ]
        planted = lines[: variant.num_keys * variant.num_values]
        if variant.haystack == "needle":
            hay = lines[len(planted) :]
        else:
            hay = (noise_lines if variant.haystack == "noise" else essay_sentences)(request.size)
        text, depth = plant(rng, hay, planted, request.depth_fraction)
        separator = " " if variant.haystack == "essay" else "\n"
        asked = keys[: variant.num_queries]
        return Draft(
            _question(variant, separator.join(text), asked),
            tuple(value for own in per_key[: variant.num_queries] for value in own),
            depth,
        )

    return build


def plant(
    rng: random.Random, hay: Sequence[str], needles: Sequence[str], depth: float | None
) -> tuple[list[str], float]:
    """Puts needles between pieces of hay.

    Args:
      rng: draws the depths.
      hay: pieces, in order.
      needles: at most 40 pieces to plant.
      depth: where the first needle lies, 0 (before all hay) to 1 (behind it); None draws it.

    Returns:
      All pieces in order, and the depth of the first needle.
    """
    depths = [i / (NUM_DEPTHS - 1) for i in rng.sample(range(NUM_DEPTHS), len(needles))]
    if depth is not None:
        depths[0] = depth
    order = sorted(range(len(needles)), key=lambda i: depths[i])
    text: list[str] = []
    begin = 0
    for i in order:
        end = round(depths[i] * len(hay))
        text += [*hay[begin:end], needles[i]]
        begin = end
    return [*text, *hay[begin:]], depths[0]


def _question(variant: Needles, text: str, keys: Sequence[str]) -> str:
    kind = variant.value
    several = len(keys) * variant.num_values > 1
    asked = keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + f", and {keys[-1]}"
    things, verb = (f"{kind}s", "are") if several else (kind, "is")
    wanted = f"all the special magic {things}" if several else f"the special magic {things}"
    return (
        f"Some special magic {kind}s are hidden in the following text. Keep them in mind: you will "
        f"be asked for them afterwards.\n{text}\n"
        f"What {verb} {wanted} for {asked} mentioned in the text above?\n"
        f"Answer: {wanted[0].upper()}{wanted[1:]} for {asked} mentioned in the text above {verb}"
    )


def _passkey(request: Request) -> Draft:
    (key,) = numbers(request.rng, 1, digits=5)
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."
    hay = noise_lines(request.size)
    text, depth = plant(request.rng, hay, [needle], request.depth_fraction)
    prompt = (
        "There is one important fact hidden in a lot of irrelevant text. Find it and memorise it."
        "\n{}\nWhat is the pass key?\nAnswer: The pass key is"
    ).format("\n".join(text))
    return Draft(prompt, (key,), depth)


NEEDLE_TASKS = (
    *(Task(name, _build(v), 128, "all", has_depth=True) for name, v in VARIANTS.items()),
    Task("passkey", _passkey, 16, "all", has_depth=True),
)
