"""All tasks by name.

RULER's two question-answering tasks need SQuAD and HotpotQA, which are no part of this package; its
own generated files, with these tasks in them, can be read from the disk instead.
"""

from __future__ import annotations

from fluxion_jax.errors import ConfigError
from fluxion_jax.evaluation.copying import COPYING_TASKS
from fluxion_jax.evaluation.counting import COUNTING_TASKS
from fluxion_jax.evaluation.needles import NEEDLE_TASKS
from fluxion_jax.evaluation.samples import Encoder, Sample, Task, fit

TASKS: dict[str, Task] = {
    task.name: task for task in (*NEEDLE_TASKS, *COUNTING_TASKS, *COPYING_TASKS)
}


def make_sample(
    task: str,
    tokenizer: Encoder,
    length_tokens: int,
    seed: int,
    *,
    depth_fraction: float | None = None,
) -> Sample:
    """Makes one sample of a task.

    Args:
      task: a name out of `TASKS`.
      tokenizer: of the model that will answer.
      length_tokens: upper limit of prompt and answer together; the prompt is made as long as fits.
      seed: the same seed gives the same sample.
      depth_fraction: where the answer lies, 0 to 1, for tasks that have a place; None draws it.

    Raises:
      ConfigError: no such task, a length too short for it, or a depth it does not have.
    """
    if task not in TASKS:
        raise ConfigError(f"expected a task out of {', '.join(TASKS)}, got {task!r}; name one")
    return fit(TASKS[task], tokenizer, length_tokens, seed, depth_fraction)
