"""What a model's heads need: which of them stream, and how much the others must read.

Labels are made where answers begin, of retrieval tasks and of real text, so that the picture shows
heads at work and at rest. Axes: E tolerances, D granularities, L layers, T steps, N query heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from fluxion_jax.bench.stamp import stamp
from fluxion_jax.cache.layout import GRANULARITIES_TOKENS
from fluxion_jax.demo import long_text
from fluxion_jax.errors import ConfigError
from fluxion_jax.evaluation.fingerprints import model_fingerprint
from fluxion_jax.evaluation.labels import TOLERANCES, Labels, make_labels
from fluxion_jax.evaluation.making import one_sample
from fluxion_jax.evaluation.real_text import stretches
from fluxion_jax.evaluation.runner import REAL_TEXT
from fluxion_jax.models.load import LoadedModel, load_model
from fluxion_jax.plotting import COLOURS, require_matplotlib
from fluxion_jax.progress import bar_options


@dataclasses.dataclass(frozen=True)
class Study:
    """What to look at.

    Attributes:
      tasks: names out of `TASKS`, and `real_text`.
      length_tokens: of each sample.
      samples: per task.
      steps: consecutive decode steps of each sample, from the answer's first token on.
      seed: of the first sample; below those of the frozen protocol.
    """

    tasks: tuple[str, ...] = ("niah_multikey_2", "vt", REAL_TEXT)
    length_tokens: int = 2048
    samples: int = 2
    steps: int = 8
    seed: int = 500


def study_heads(
    model: str | LoadedModel, study: Study | None = None, *, progress: bool | None = None
) -> dict[str, Any]:
    """Labels heads and sums up what they need.

    Args:
      model: loaded, or what `load_model` takes; without sliding-window layers.
      study: what to look at; None takes the defaults.
      progress: show a progress bar; None shows it on a terminal and in a notebook.

    Returns:
      JSON-ready: `stamp`, `settings`, `tolerances`, `granularities`, and per tolerance
      `streaming_fraction` (of heads and steps), `streaming_groups` (share of groups all of whose
      heads stream), `budget_fraction` `[D]` (mean share of the sequence, streaming heads included);
      per tolerance, layer and head `head_streaming` and `head_budget_fraction` (at 16 tokens).

    Raises:
      ConfigError: the model has no tokenizer, or what it asks for does not fit it.
    """
    study = study or Study()
    loaded = model if isinstance(model, LoadedModel) else load_model(model)
    if loaded.tokenizer is None:
        raise ConfigError(f"expected a model with a tokenizer, got {loaded.name} without one")
    found: list[Labels] = []
    texts = [(task, i) for task in study.tasks for i in range(study.samples)]
    for task, i in tqdm(texts, desc="heads", **bar_options(progress)):
        tokens, first = _text(loaded, study, task, study.seed + i)
        found += make_labels(loaded, tokens, [first], steps=study.steps, progress=False)
    budgets = np.concatenate([label.budget_tokens for label in found], axis=3)
    errors = np.concatenate([label.window_error for label in found], axis=1)
    lengths = np.concatenate([label.first_position + 1 + np.arange(study.steps) for label in found])
    streaming = errors <= np.asarray(TOLERANCES)[:, None, None, None]
    shares = budgets / lengths[:, None]
    kv_heads = loaded.config.num_kv_heads
    groups = streaming.reshape(*streaming.shape[:3], kv_heads, -1).all(axis=-1)
    return {
        "evaluation": "heads",
        "stamp": stamp(),
        "settings": {
            **dataclasses.asdict(study),
            "model": loaded.name,
            "model_sha256": model_fingerprint(loaded.model, loaded.config),
        },
        "tolerances": list(TOLERANCES),
        "granularities": list(GRANULARITIES_TOKENS),
        "streaming_fraction": streaming.mean(axis=(1, 2, 3)).tolist(),
        "streaming_groups": groups.mean(axis=(1, 2, 3)).tolist(),
        "budget_fraction": shares.mean(axis=(2, 3, 4)).tolist(),
        "head_streaming": streaming.mean(axis=2).tolist(),
        "head_budget_fraction": shares[:, 0].mean(axis=2).tolist(),
    }


def _text(model: LoadedModel, study: Study, task: str, seed: int) -> tuple[Sequence[int], int]:
    """Tokens of a sample and the position at which labels begin."""
    assert model.tokenizer is not None
    if task == REAL_TEXT:
        tokens = model.tokenizer.encode(long_text())
        (text,) = stretches(tokens, study.length_tokens, [seed])
        return text, len(text) - study.steps - 1
    sample = one_sample(model.tokenizer, task, study.length_tokens, seed)
    answer = model.tokenizer.encode(" " + ", ".join(sample.references) + ".")
    # A short answer is followed by itself: heads must have something to do in every step.
    answer = answer * (-(-study.steps // len(answer)) + 1)
    return [*sample.tokens, *answer[: study.steps]], len(sample.tokens) - 1


def render(report: dict[str, Any]) -> str:
    """The table as text."""
    lines = [
        "| tolerance | streaming heads | all-streaming groups | mean budget at "
        + " / ".join(map(str, report["granularities"]))
        + " |",
        "|---|---|---|---|",
    ]
    for e, tolerance in enumerate(report["tolerances"]):
        budgets = " / ".join(f"{100 * b:.1f}" for b in report["budget_fraction"][e])
        lines.append(
            f"| {tolerance:g} | {report['streaming_fraction'][e]:.0%} "
            f"| {report['streaming_groups'][e]:.0%} | {budgets} % |"
        )
    return "\n".join(lines)


def heads_figure(report: dict[str, Any], tolerance: float = 0.1) -> Any:
    """Heat maps per layer and head at one tolerance, and budgets by granularity at all of them.

    Args:
      report: of `study_heads`.
      tolerance: one of the report's.

    Returns:
      A matplotlib `Figure`.

    Raises:
      ConfigError: the report has no such tolerance.
    """
    if tolerance not in report["tolerances"]:
        raise ConfigError(f"expected a tolerance of {report['tolerances']}, got {tolerance}")
    at = report["tolerances"].index(tolerance)
    figure = require_matplotlib().Figure(figsize=(12, 3.8), layout="constrained", dpi=150)
    settings = report["settings"]
    figure.suptitle(
        f"Heads of {settings['model']}, {settings['length_tokens']} tokens of "
        f"{', '.join(settings['tasks'])}",
        fontsize=11,
        x=0.01,
        ha="left",
    )
    panels = figure.subplots(1, 3)
    maps = (
        ("head_streaming", f"window suffices, error ≤ {tolerance:g} (% of steps)", "viridis", 100),
        ("head_budget_fraction", f"budget at 16 tokens, error ≤ {tolerance:g} (%)", "magma", None),
    )
    for axes, (name, title, colours, most) in zip(panels, maps, strict=False):
        values = 100 * np.asarray(report[name][at])
        image = axes.imshow(values, aspect="auto", cmap=colours, vmin=0, vmax=most)
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_xlabel("query head", fontsize=8)
        axes.set_ylabel("layer", fontsize=8)
        axes.tick_params(labelsize=8)
        figure.colorbar(image, ax=axes, shrink=0.9).ax.tick_params(labelsize=8)
    for e, one in enumerate(report["tolerances"]):
        panels[2].plot(
            report["granularities"],
            100 * np.asarray(report["budget_fraction"][e]),
            "o-",
            color=COLOURS[e % len(COLOURS)],
            label=f"{one:g}",
        )
    panels[2].set_xscale("log", base=2)
    panels[2].set_xticks(report["granularities"], map(str, report["granularities"]))
    # The legend lies above the curves.
    panels[2].set_ylim(0, 1.4 * 100 * np.max(report["budget_fraction"]))
    panels[2].set_title("mean budget by granularity (% of the context)", fontsize=9, loc="left")
    panels[2].set_xlabel("granularity (tokens)", fontsize=8)
    panels[2].tick_params(labelsize=8)
    panels[2].legend(title="tolerance", fontsize=8, title_fontsize=8, frameon=False, ncols=3)
    return figure
