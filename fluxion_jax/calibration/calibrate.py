"""`calibrate`: from a model and texts to a predictor, its safety, and a report of what it achieves.

The texts are divided into three parts that share no text: the predictor is trained on the first,
threshold and margin are chosen on the second, and everything reported is measured on the third.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fluxion_jax.bench.stamp import stamp
from fluxion_jax.calibration.baselines import rate_baselines
from fluxion_jax.calibration.rating import Judge, Predictions
from fluxion_jax.calibration.samples import SAMPLES, HeadSamples, collect_samples
from fluxion_jax.calibration.storage import (
    kept_folder,
    make_policy,
    model_identity,
    save_calibration,
)
from fluxion_jax.calibration.texts import calibration_texts
from fluxion_jax.calibration.training import FlatSamples, flatten, predict, train_predictor
from fluxion_jax.errors import ConfigError
from fluxion_jax.models.load import LoadedModel, load_model
from fluxion_jax.policy.features import FAMILIES, NAMES
from fluxion_jax.policy.fluxion_policy import DEFAULT_TOLERANCE, FluxionPolicy, Safety
from fluxion_jax.policy.head_predictor import HeadPredictor
from fluxion_jax.session import CHUNK_TOKENS

_PARTS = 3
# One text of so many for the safety, and as many for the report: what a predictor lacks is texts.
_SET_ASIDE = 6


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to calibrate.

    Attributes:
      length_tokens: of every third text, others are half and a quarter as long; plans are best
        within the lengths that were seen.
      texts: at least 3; a sixth of them, rounded down, at least one, each for choosing the safety
        and for the report.
      steps: decode steps that are looked at in an answer, at most; in prose it is 16.
      tolerances: of the output error; the range within which the tolerance may be set later.
      under_budget: share of heads and steps whose budget may fall short where the safety is chosen;
        0.025, so that it stays below 3 % on texts that are a little harder.
      error_left: by how much errors may exceed the tolerance there: the norm over the heads of a
        step, in the mean over steps. It binds at loose tolerances, where few heads need more than
        the window and `under_budget` alone would let all be missed.
      training_steps: of the optimiser, in batches of 1,024 samples.
      seed: of weights and batches.
      ablate: also train without each family of features, and report what each one buys.
    """

    length_tokens: int = 4096
    texts: int = 16
    steps: int = 128
    tolerances: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
    under_budget: float = 0.025
    error_left: float = 0.02
    training_steps: int = 4000
    seed: int = 0
    ablate: bool = False

    def __post_init__(self) -> None:
        for name, least, most in (
            ("texts", _PARTS, 1 << 20),
            ("steps", 2, 256),
            ("training_steps", 1, 1 << 24),
        ):
            if not least <= getattr(self, name) <= most:
                raise ConfigError(
                    f"expected {name} from {least} to {most}, got {getattr(self, name)}; change it"
                )
        for name in ("under_budget", "error_left"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ConfigError(f"expected {name} in (0, 1), got {getattr(self, name)}")
        ascending = tuple(sorted(set(self.tolerances)))
        if len(ascending) < 2 or ascending[0] <= 0.0 or ascending != self.tolerances:
            raise ConfigError(
                f"expected two or more ascending tolerances above 0, got {self.tolerances}"
            )


# To try it out, in a minute and a half of processor time for a model of 12 million parameters:
# too few texts to rely on what it predicts. With fewer still, the margin that their safety takes
# costs more than a table of one budget per head.
QUICK = Settings(
    length_tokens=2048,
    texts=12,
    steps=16,
    tolerances=(0.02, 0.05, 0.1, 0.2, 0.4),
    training_steps=600,
)


def calibrate(
    model: str | LoadedModel,
    settings: Settings | None = None,
    *,
    data: str | Path | None = None,
    output: str | Path | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    progress: bool | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[FluxionPolicy, dict[str, Any]]:
    """Calibrates the Fluxion policy for a model and keeps the weights.

    What a text brought is kept beside the weights, so that a calibration that was interrupted, or
    is repeated with other settings of the training, goes on where it can.

    Args:
      model: loaded, or what `load_model` takes.
      settings: how; None for the defaults.
      data: text to read, see `calibration_texts`; None takes the standard library and questions.
      output: folder of the weights; None takes the one where the policy `fluxion` looks.
      chunk_tokens: tokens that one compiled call prefills.
      progress: show progress bars; None shows them on a terminal and in a notebook.
      say: told in one line what happens next.

    Returns:
      The policy, and the JSON-ready report that was written beside the weights.

    Raises:
      ConfigError: a setting does not fit, there is too little text, or no layer of the model has a
        host cache.

    Example:
      >>> import fluxion_jax as fx
      >>> from fluxion_jax.calibration.calibrate import Settings
      >>> settings = Settings(length_tokens=2048, texts=3, training_steps=200)
      >>> policy, report = fx.calibrate("recall-12m", settings)  # doctest: +SKIP
    """
    settings = settings or Settings()
    if not isinstance(model, LoadedModel):
        say(f"loading {model}")
        model = load_model(model)
    if not model.config.kv_layout().global_layers:
        raise ConfigError(
            "expected a model with a layer that attends to everything, got sliding windows in all "
            f"layers of {model.name}; there is nothing to calibrate, use it with the policy full"
        )
    texts = calibration_texts(
        model,
        length_tokens=settings.length_tokens,
        count=settings.texts,
        steps=settings.steps,
        data=None if data is None else Path(data),
    )
    identity = model_identity(model.model, model.config)
    folder = kept_folder(identity) if output is None else Path(output).expanduser()
    say(f"running {len(texts)} texts of {settings.length_tokens} tokens")
    samples = collect_samples(
        model,
        texts,
        tolerances=settings.tolerances,
        chunk_tokens=chunk_tokens,
        folder=folder / SAMPLES,
        identity=identity,
        progress=progress,
    )
    sizes = model.config.num_layers, model.config.num_heads
    policy, report = fit(samples, settings, *sizes, progress=progress, say=say)
    report = {
        "calibration": "fluxion",
        "stamp": stamp(),
        "settings": {
            "model": model.name,
            "identity": identity,
            "data": "standard library and questions" if data is None else str(data),
            "texts": [text.name for text in texts],
            **{k: v for k, v in dataclasses.asdict(settings).items() if k != "texts"},
        },
        **report,
    }
    save_calibration(folder, policy, identity, report)
    say(f"weights: {folder}")
    return policy, report


def fit(
    samples: HeadSamples,
    settings: Settings,
    num_layers: int,
    num_heads: int,
    *,
    progress: bool | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[FluxionPolicy, dict[str, Any]]:
    """Trains, chooses the safety and rates, given samples of at least three texts.

    Returns:
      The policy at the default tolerance, and the report's measured part.
    """
    train, tuning, held_out = divide(samples)
    say(f"training on {len(train.host_tokens) * len(samples.layers) * num_heads} samples")
    errors = np.asarray(samples.errors, np.float32)
    num_tolerances = int((errors <= np.float32(settings.tolerances[-1])).sum())
    flat = flatten(train)

    def trained(data: FlatSamples) -> tuple[HeadPredictor, list[float]]:
        return train_predictor(
            data,
            errors,
            num_tolerances,
            num_layers,
            num_heads,
            num_steps=settings.training_steps,
            seed=settings.seed,
            progress=progress,
        )

    predictor, losses = trained(flat)
    say("choosing the safety, rating")
    judges = {
        tolerance: (Judge(tuning, index), Judge(held_out, index))
        for tolerance in settings.tolerances
        for index in (samples.errors.index(tolerance),)
    }
    targets = settings.under_budget, settings.error_left

    def safe_and_rated(
        predictor: HeadPredictor, name: str, family: str | None = None
    ) -> tuple[Safety, list[dict[str, Any]]]:
        chosen, rows = [], []
        for tolerance, (tuner, rater) in judges.items():
            tuned, predicted = (
                _predictions(predictor, part, tolerance, family) for part in (tuning, held_out)
            )
            chosen.append(tuner.choose_safety(tuned, *targets))
            rating = rater.rate(predicted, *chosen[-1])
            rows.append({"method": name, "tolerance": tolerance, **rating._asdict()})
        columns = (np.asarray(x, np.float32) for x in zip(*chosen, strict=True))
        return Safety(np.asarray(settings.tolerances, np.float32), *columns), rows

    safety, rows = safe_and_rated(predictor, "predictor")
    for tolerance, pair in judges.items():
        index = samples.errors.index(tolerance)
        baselines = rate_baselines(train, tuning, held_out, pair, index, *targets)
        rows += [{"method": m, "tolerance": tolerance, **r} for m, r in baselines.items()]
    ablation = []
    for family in FAMILIES if settings.ablate else ():
        say(f"training without {family}")
        other, _ = trained(without(flat, family))
        ablation += safe_and_rated(other, family, family)[1]
    heads = len(samples.layers) * num_heads
    parts = {"train": train, "tuning": tuning, "held_out": held_out}
    report = {
        "samples": {name: len(part.host_tokens) * heads for name, part in parts.items()},
        "losses": losses,
        "safety": {k: np.asarray(v).tolist() for k, v in dataclasses.asdict(safety).items()},
        "rows": rows,
        "ablation": ablation,
    }
    default = float(np.clip(DEFAULT_TOLERANCE, settings.tolerances[0], settings.tolerances[-1]))
    return make_policy(predictor, safety, default), report


def divide(samples: HeadSamples) -> tuple[HeadSamples, HeadSamples, HeadSamples]:
    """Training, tuning and held-out parts, by whole texts; the held-out ones are spread."""
    texts = np.unique(samples.text)
    part = max(1, len(texts) // _SET_ASIDE)
    tuning = texts[-2 * part : -part]
    held_out = texts[-part:]
    of = [np.isin(samples.text, chosen) for chosen in (tuning, held_out)]
    return samples.of(~of[0] & ~of[1]), samples.of(of[0]), samples.of(of[1])


def without(data: FlatSamples, family: str) -> FlatSamples:
    """The samples with a family of features held constant."""
    kept = ~np.isin(NAMES, FAMILIES[family])
    return data._replace(features=np.where(kept, data.features, 0.0).astype(np.float32))


def _predictions(
    predictor: HeadPredictor, samples: HeadSamples, tolerance: float, family: str | None
) -> Predictions:
    data = flatten(samples)
    data = data if family is None else without(data, family)
    return predict(predictor, data, tolerance, samples.features.shape[:3])
