"""A task's sample: a prompt of a wanted length in tokens, and the answers that count."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import NamedTuple, Protocol

from fluxion_jax.errors import ConfigError


class Encoder(Protocol):
    """What is needed of a tokenizer; `models.tokenizer.Tokenizer` is one."""

    def encode(self, text: str) -> list[int]:
        """Turns text into token ids."""
        ...


class Draft(NamedTuple):
    """A prompt whose length has not been checked.

    Attributes:
      prompt: text, the beginning of the answer included.
      references: texts that a right answer contains.
      depth_fraction: where the first answer lies in the haystack, 0 to 1; None where it has no
        single place.
    """

    prompt: str
    references: tuple[str, ...]
    depth_fraction: float | None


class Request(NamedTuple):
    """What a task builds a draft from.

    Attributes:
      rng: seeded afresh for every draft of a sample, so that drafts differ in size alone.
      size: of the haystack in the task's own unit, at least 1.
      length_tokens: the length that is aimed at.
      depth_fraction: where the first answer must lie, 0 to 1; None draws it.
    """

    rng: random.Random
    size: int
    length_tokens: int
    depth_fraction: float | None


@dataclasses.dataclass(frozen=True)
class Task:
    """A generator of samples.

    Attributes:
      name: as in the result files.
      build: makes a draft; a larger size makes a longer prompt.
      max_new_tokens: room for the answer; prompt and answer together keep to the length.
      metric: a name out of `metrics.METRICS`.
      has_depth: whether the place of the answer can be chosen.
    """

    name: str
    build: Callable[[Request], Draft]
    max_new_tokens: int
    metric: str
    has_depth: bool = False


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt with its answers.

    Attributes:
      task: name of the task.
      seed: of the generator.
      length_tokens: the length asked for, prompt and answer together.
      prompt: text.
      tokens: its ids.
      references: texts that a right answer contains.
      max_new_tokens: tokens to generate at most.
      metric: a name out of `metrics.METRICS`.
      depth_fraction: where the first answer lies in the haystack, 0 to 1, or None.
    """

    task: str
    seed: int
    length_tokens: int
    prompt: str
    tokens: tuple[int, ...]
    references: tuple[str, ...]
    max_new_tokens: int
    metric: str
    depth_fraction: float | None


def fit(
    task: Task,
    tokenizer: Encoder,
    length_tokens: int,
    seed: int,
    depth_fraction: float | None = None,
) -> Sample:
    """Makes the longest sample that keeps to a length.

    Args:
      task: the generator.
      tokenizer: counts the tokens.
      length_tokens: upper limit of prompt and `max_new_tokens` together.
      seed: the same seed gives the same sample.
      depth_fraction: where the first answer lies, 0 to 1; None draws it.

    Raises:
      ConfigError: even the smallest prompt is too long, or the task has no depth.
    """
    if depth_fraction is not None and not (task.has_depth and 0 <= depth_fraction <= 1):
        raise ConfigError(
            f"expected a depth within [0, 1] of a task that has one, got {depth_fraction} for "
            f"{task.name}; leave it out"
        )
    room = length_tokens - task.max_new_tokens

    def attempt(size: int) -> tuple[Draft, list[int]]:
        rng = random.Random(f"{task.name}:{seed}")
        draft = task.build(Request(rng, size, length_tokens, depth_fraction))
        return draft, tokenizer.encode(draft.prompt)

    best = attempt(1)
    if len(best[1]) > room:
        raise ConfigError(
            f"expected at least {len(best[1]) + task.max_new_tokens} tokens for {task.name} with "
            f"this tokenizer, got length_tokens={length_tokens}; ask for more"
        )
    # Prompts grow evenly with their size, so a line through two of them says what to try next.
    fits, at_fit, too_large, at_large = 1, len(best[1]), 0, 0
    slope = 0.0
    while too_large - fits != 1:
        guess = fits + max(1, int((room - at_fit) / slope)) if slope else fits + 1
        if too_large:
            guess = min(guess, too_large - 1)
        tried = attempt(guess)
        count = len(tried[1])
        slope = max(1e-3, (count - at_fit) / (guess - fits)) if count != at_fit else slope
        if count <= room:
            best, fits, at_fit = tried, guess, count
        else:
            too_large, at_large = guess, count
        if too_large:
            slope = max(1e-3, (at_large - at_fit) / (too_large - fits))
    draft, tokens = best
    return Sample(
        task=task.name,
        seed=seed,
        length_tokens=length_tokens,
        prompt=draft.prompt,
        tokens=tuple(tokens),
        references=draft.references,
        max_new_tokens=task.max_new_tokens,
        metric=task.metric,
        depth_fraction=draft.depth_fraction,
    )
