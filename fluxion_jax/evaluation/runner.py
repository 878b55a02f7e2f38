"""Runs tasks under policies on one model and reports scores, differences and bytes."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fluxion_jax.attention import Execution
from fluxion_jax.bench.stamp import stamp
from fluxion_jax.demo import long_text
from fluxion_jax.errors import ConfigError
from fluxion_jax.evaluation.answers import answer, answer_together
from fluxion_jax.evaluation.fingerprints import model_fingerprint, policy_fingerprint
from fluxion_jax.evaluation.making import Key, made_groups, one_sample
from fluxion_jax.evaluation.real_text import compare, compare_together, stretches
from fluxion_jax.evaluation.report import answer_rows, text_rows
from fluxion_jax.evaluation.samples import Sample
from fluxion_jax.evaluation.summary import summary_rows
from fluxion_jax.evaluation.tasks import TASKS
from fluxion_jax.models.load import LoadedModel, load_model
from fluxion_jax.models.packaged import SHIPPED_MODEL
from fluxion_jax.policy.parse import check_policy, parse_policy
from fluxion_jax.policy.protocol import Policy
from fluxion_jax.progress import bar_options

REAL_TEXT = "real_text"
DEFAULT_MODEL = SHIPPED_MODEL
DEFAULT_POLICIES = ("full", "fixed:16:0.05")
DEFAULT_TASKS = ("niah_multikey_2", "vt", "key_value", REAL_TEXT)
# With the shipped model a few minutes on two cores.
DEFAULT_LENGTHS = (2048, 4096)
DEFAULT_SAMPLES = 4
# Enough to measure perplexity to a few hundredths with several stretches.
SCORED_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to evaluate.

    Attributes:
      policies: names or objects; full attention is the reference and put in front if missing.
      tasks: names out of `TASKS`, and `real_text`.
      lengths_tokens: prompt and answer together.
      samples: per task and length.
      seed: of the first sample; the next samples have the next seeds.
      batch: samples that are prefilled and decoded together; part of a result's identity, because
        rounding depends on it.
      scored_tokens: tokens at the end of each stretch of real text that are scored.
      text: the real text; None takes English prose out of the standard library.
      shared_prefix: all policies answer at once from one prefix on the device instead of from
        forked host caches; the only way to run `oracle:TOLERANCE`. See `evaluation.branches`.
    """

    policies: tuple[str | Policy, ...] = DEFAULT_POLICIES
    tasks: tuple[str, ...] = DEFAULT_TASKS
    lengths_tokens: tuple[int, ...] = DEFAULT_LENGTHS
    samples: int = DEFAULT_SAMPLES
    seed: int = 0
    batch: int = 4
    scored_tokens: int = SCORED_TOKENS
    text: str | None = None
    shared_prefix: bool = False

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in TASKS and task != REAL_TEXT]
        if unknown:
            raise ConfigError(
                f"expected tasks out of {', '.join([*TASKS, REAL_TEXT])}, got {unknown[0]!r}; "
                "name one of them"
            )
        for name in ("samples", "batch", "scored_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"expected {name} >= 1, got {getattr(self, name)}; ask for more")
        short = [n for n in self.lengths_tokens if n < self.scored_tokens + 2]
        if short:
            raise ConfigError(
                f"expected lengths of at least {self.scored_tokens + 2} tokens, got {short[0]}; "
                "ask for more"
            )


def task_samples(
    model: LoadedModel, task: str, length_tokens: int, seeds: Iterable[int]
) -> list[Sample]:
    """Samples of a task; answers lie at depths that spread evenly, whatever their number.

    Args:
      model: its tokenizer counts the tokens.
      task: a name out of `TASKS`.
      length_tokens: prompt and answer together.
      seeds: one per sample; a seed says the depth as well.
    """
    assert model.tokenizer is not None
    return [one_sample(model.tokenizer, task, length_tokens, seed) for seed in seeds]


def evaluate(
    model: str | LoadedModel = DEFAULT_MODEL,
    settings: Settings | None = None,
    *,
    data: Sequence[Sample] | None = None,
    folder: Path | None = None,
    execution: Execution | None = None,
    workers: int = 0,
    progress: bool | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Evaluates policies on a model, each from a fork of the same prefilled caches.

    Args:
      model: loaded, or what `load_model` takes.
      settings: what to evaluate; None takes the defaults.
      data: samples to answer instead of those of the settings' tasks, in any order; see
        `data.load_data`.
      folder: finished cells are kept there, by what they depend on, and not computed again.
      execution: how a step runs; None for the product's defaults.
      workers: processes that make the samples while the model answers; 0 makes them in this one. A
        script that asks for workers must guard its start with `if __name__ == "__main__":`.
      progress: show progress bars; None shows them on a terminal and in a notebook.
      say: told in one line what happens next.

    Returns:
      The report, JSON-ready: `stamp`, `settings`, `prompts_sha256` per task and length, `rows`,
      `text_rows`, `samples`, and `summary` over all tasks of a length. Scores are from 0 to 1; a
      row has the `difference` from the reference and its paired 95 % bootstrap `interval`.

    Raises:
      ConfigError: a setting does not fit the model, the model has no tokenizer, or two different
        policies print alike.
    """
    settings, execution = settings or Settings(), execution or Execution()
    for name in settings.policies:
        if isinstance(name, str):
            check_policy(name)
    if not isinstance(model, LoadedModel):
        say(f"loading {model}")
        model = load_model(model)
    if model.tokenizer is None:
        raise ConfigError(f"expected a model with a tokenizer, got {model.name} without one")
    policies = _with_reference(settings.policies, model)
    limit = model.config.max_context_tokens
    too_long = [n for n in settings.lengths_tokens if n > limit]
    if too_long and data is None:
        raise ConfigError(
            f"expected lengths of at most {limit} tokens, the context of {model.name}, got "
            f"{too_long[0]}; ask for less"
        )
    fingerprint = model_fingerprint(model.model, model.config)
    groups, num_samples = _groups(model, settings, data, workers)
    texts = {}
    if data is None and REAL_TEXT in settings.tasks:
        seeds = range(settings.seed, settings.seed + settings.samples)
        texts = real_texts(model, settings, settings.lengths_tokens, seeds)
    bars = tqdm(
        total=num_samples + settings.samples * len(texts),
        desc="evaluate",
        unit="sample",
        **bar_options(progress),
    )
    answered, rows, prompts = [], [], {}

    def answer_batch(batch: Sequence[Sample]) -> list[dict[str, Any]]:
        if settings.shared_prefix:
            return answer_together(model, fingerprint, batch, policies, folder, execution)
        return answer(model, fingerprint, batch, policies, folder, execution, progress=False)

    def compare_batch(batch: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
        given = (model, fingerprint, batch, settings.scored_tokens, policies, folder, execution)
        return (
            compare_together(*given) if settings.shared_prefix else compare(*given, progress=False)
        )

    with bars:
        for (task, length), samples in groups:
            prompts[f"{task}:{length}"] = prompts_sha256(samples)
            cells = []
            for batch in _batches(samples, settings.batch):
                bars.set_postfix_str(f"{task} {length}")
                cells.append(answer_batch(batch))
                answered += _answered(batch, cells[-1])
                bars.update(len(batch))
            rows += answer_rows(task, length, cells)
        text_table = []
        for length, stretched in texts.items():
            cells = []
            for part in _batches(stretched, settings.batch):
                bars.set_postfix_str(f"{REAL_TEXT} {length}")
                cells.append(compare_batch(part))
                bars.update(len(part))
            text_table += text_rows(length, cells)
    report = {
        "evaluation": "policies",
        "stamp": stamp(),
        "settings": {
            "model": model.name,
            "model_sha256": fingerprint,
            "policies": [str(policy) for policy in policies],
            "samples": settings.samples,
            "seed": settings.seed,
            "batch": settings.batch,
            "scored_tokens": settings.scored_tokens,
            "dense_below_tokens": execution.dense_below_tokens,
            "shared_prefix": settings.shared_prefix,
        },
        "prompts_sha256": prompts,
        "rows": rows,
        "text_rows": text_table,
        "samples": answered,
    }
    return {**report, "summary": summary_rows(report)}


def prompts_sha256(samples: Sequence[Sample]) -> str:
    """SHA-256 of the samples' prompts and references."""
    found = hashlib.sha256()
    for sample in samples:
        found.update("\0".join([sample.prompt, *sample.references, ""]).encode())
    return found.hexdigest()


def _with_reference(policies: Sequence[str | Policy], model: LoadedModel) -> list[Policy]:
    """Full attention and then the others, each once.

    Raises:
      ConfigError: different ones have one name, by which a report's rows could not be told apart.
    """
    named: dict[str, Policy] = {}
    for policy in (parse_policy(name, model) for name in ("full", *policies)):
        first = named.setdefault(str(policy), policy)
        if first is not policy and policy_fingerprint(first) != policy_fingerprint(policy):
            raise ConfigError(
                f"expected policies that differ in what they print, which names them in a report, "
                f"got two different ones that print {policy}; evaluate one of them at a time"
            )
    return list(named.values())


def _groups(
    model: LoadedModel, settings: Settings, data: Sequence[Sample] | None, workers: int
) -> tuple[Iterable[tuple[Key, list[Sample]]], int]:
    """Samples by task and length, and how many there are."""
    if data is None:
        keys = [
            (task, length)
            for task in dict.fromkeys(settings.tasks)
            if task != REAL_TEXT
            for length in dict.fromkeys(settings.lengths_tokens)
        ]
        seeds = range(settings.seed, settings.seed + settings.samples)
        return made_groups(model.tokenizer, keys, seeds, workers), len(keys) * len(seeds)
    found: dict[Key, list[Sample]] = defaultdict(list)
    # Prompts of like length together: a batch takes as long as its longest.
    for sample in sorted(data, key=lambda s: len(s.tokens)):
        found[sample.task, sample.length_tokens].append(sample)
    return found.items(), len(data)


def real_texts(
    model: LoadedModel, settings: Settings, lengths_tokens: Sequence[int], seeds: Sequence[int]
) -> dict[int, list[tuple[int, ...]]]:
    """Stretches of the settings' text by their length, one per seed, in the model's tokens."""
    assert model.tokenizer is not None
    tokens = model.tokenizer.encode(long_text() if settings.text is None else settings.text)
    return {n: stretches(tokens, n, seeds) for n in dict.fromkeys(lengths_tokens)}


def _batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _answered(samples: Sequence[Sample], cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "task": sample.task,
            "length_tokens": sample.length_tokens,
            "seed": sample.seed,
            "depth_fraction": sample.depth_fraction,
            "prompt_tokens": len(sample.tokens),
            "policy": found["policy"],
            "score": found["score"][i],
            "text": found["text"][i],
        }
        for found in cells
        for i, sample in enumerate(samples)
    ]
