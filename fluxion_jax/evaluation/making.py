"""Makes the samples of an evaluation, a few groups ahead of the model that answers them."""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from fluxion_jax.evaluation.needles import NUM_DEPTHS
from fluxion_jax.evaluation.real_text import spread
from fluxion_jax.evaluation.samples import Sample
from fluxion_jax.evaluation.tasks import TASKS, make_sample

# Enough that no worker waits; whole groups of long prompts are large.
_GROUPS_AHEAD = 2
_CHUNK = 4

Key = tuple[str, int]


def one_sample(tokenizer: Any, task: str, length_tokens: int, seed: int) -> Sample:
    """A sample of a task; the seed says its depth as well, so that depths spread evenly."""
    steps = NUM_DEPTHS - 1
    depth = round(spread(seed) * steps) / steps if TASKS[task].has_depth else None
    return make_sample(task, tokenizer, length_tokens, seed, depth_fraction=depth)


def made_groups(
    tokenizer: Any, keys: Sequence[Key], seeds: range, workers: int
) -> Iterator[tuple[Key, list[Sample]]]:
    """Samples of each task and length, in order.

    Args:
      tokenizer: counts the tokens.
      keys: tasks and lengths.
      seeds: one per sample.
      workers: processes that make them; 0 makes them here, when they are wanted.
    """
    if not workers:
        for task, length in keys:
            yield (task, length), [one_sample(tokenizer, task, length, seed) for seed in seeds]
        return
    # Not forks: JAX has threads.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        waiting: deque[Iterator[Sample]] = deque()
        left = iter(keys)

        def submit() -> None:
            for task, length in left:
                make = functools.partial(one_sample, tokenizer, task, length)
                waiting.append(pool.map(make, seeds, chunksize=_CHUNK))
                return

        for _ in range(_GROUPS_AHEAD):
            submit()
        for key in keys:
            samples = list(waiting.popleft())
            submit()
            yield key, samples
