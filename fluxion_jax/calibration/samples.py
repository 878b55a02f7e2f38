"""Samples of a calibration: features as the decode step sees them, and what heads really needed.

The features are recorded by the product's own decode step, teacher-forced under full attention, so
there is no second implementation that could differ from the first. The labels of the same steps
come from `evaluation.labels`.

Axes: S steps, L global layers, N query heads, F features, E tolerances, D granularities.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx
from tqdm import tqdm

from fluxion_jax.attention import Execution
from fluxion_jax.cache.host_kv import HostKV
from fluxion_jax.calibration.texts import CalibrationText
from fluxion_jax.evaluation.fingerprints import digest
from fluxion_jax.evaluation.labels import make_labels
from fluxion_jax.generation import prefill
from fluxion_jax.jitting import jit
from fluxion_jax.models.load import LoadedModel
from fluxion_jax.policy.features import NAMES, head_features
from fluxion_jax.policy.fixed_policy import full
from fluxion_jax.policy.protocol import Features, Plan, Policy
from fluxion_jax.policy.split import Split, one_sided
from fluxion_jax.progress import bar_options
from fluxion_jax.session import cache_dtype

# What a prompt's end told of the heads is as old as the generation is long: stretches alternate.
_AGES_TOKENS = (0, 16, 64, 256)
SAMPLES = "samples"
"""Folder of the samples, beside the weights."""


class HeadSamples(NamedTuple):
    """Steps of all heads.

    Attributes:
      features: float32 `[S, L, N, F]`.
      budget_tokens: int32 `[S, E, D, L, N]`, smallest budgets; 0 where the window suffices.
      host_tokens: int32 `[S]`.
      text: int32 `[S]`, index of the text.
      stretch: int32 `[S]`, index of the stretch of consecutive steps.
      layers: indices in the model of the layers.
      tolerances: ascending.
    """

    features: npt.NDArray[np.float32]
    budget_tokens: npt.NDArray[np.int32]
    host_tokens: npt.NDArray[np.int32]
    text: npt.NDArray[np.int32]
    stretch: npt.NDArray[np.int32]
    layers: tuple[int, ...]
    tolerances: tuple[float, ...]

    def of(self, steps: npt.NDArray[np.bool_]) -> HeadSamples:
        """Only the steps of a bool `[S]`."""
        return self._replace(
            **{
                name: getattr(self, name)[steps]
                for name in ("features", "budget_tokens", "host_tokens", "text", "stretch")
            }
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FeatureRecorder:
    """Plans like another policy and hands the features through as the plan's notes.

    Attributes:
      policy: decides.
    """

    policy: Policy

    def plan(self, features: Features, lengths: jax.Array) -> Plan:
        """See `Policy.plan`."""
        return self.policy.plan(features, lengths)._replace(notes=head_features(features))


def collect_samples(
    model: LoadedModel,
    texts: Sequence[CalibrationText],
    *,
    steps: int,
    tolerances: Sequence[float],
    chunk_tokens: int,
    folder: Path | None = None,
    identity: str = "",
    progress: bool | None = None,
) -> HeadSamples:
    """Runs texts through the model twice: densely for labels, and step by step for features.

    Args:
      model: loaded.
      texts: sequences and the positions to look at.
      steps: consecutive decode steps at each position.
      tolerances: of the output error.
      chunk_tokens: tokens that one compiled call prefills.
      folder: where the samples of each text are kept, and not made again; None keeps none.
      identity: of the model, from `model_identity`; part of the names of what is kept.
      progress: show a progress bar; None shows it on a terminal and in a notebook.
    """
    limits = tuple(sorted(tolerances))
    layout = model.config.kv_layout(cache_dtype(model.model), sketch=True)
    capacity = max(len(text.tokens) for text in texts)
    cache: HostKV | None = None
    found: list[_Part] = []
    stretches = 0
    bar = tqdm(texts, desc="samples", unit="text", **bar_options(progress))
    for text in bar:
        bar.set_postfix_str(text.name)
        ages = [
            _AGES_TOKENS[(stretches + i) % len(_AGES_TOKENS)]
            for i in range(len(text.first_positions))
        ]
        stretches += len(ages)
        name = digest(
            identity=identity,
            features=NAMES,
            text=(text.tokens, text.first_positions),
            how=(ages, steps, limits, chunk_tokens, capacity),
        )
        part = _kept(folder, name)
        if part is None:
            cache = HostKV.allocate(layout, 1, capacity) if cache is None else cache.reset()
            part = _collect(model, text, cache, ages, steps, limits, chunk_tokens)
            _keep(folder, name, part)
        found.append(part)
    lengths = [len(text.first_positions) for text in texts]
    return HeadSamples(
        np.concatenate([part.features for part in found]),
        np.concatenate([part.budget_tokens for part in found]),
        np.concatenate([part.host_tokens for part in found]),
        np.repeat(np.arange(len(texts)), np.multiply(lengths, steps)).astype(np.int32),
        np.repeat(np.arange(sum(lengths)), steps).astype(np.int32),
        layout.global_layers,
        limits,
    )


class _Part(NamedTuple):
    """What one text brings; see `HeadSamples`."""

    features: npt.NDArray[np.float32]
    budget_tokens: npt.NDArray[np.int32]
    host_tokens: npt.NDArray[np.int32]


def _collect(
    model: LoadedModel,
    text: CalibrationText,
    cache: HostKV,
    ages: Sequence[int],
    steps: int,
    tolerances: Sequence[float],
    chunk_tokens: int,
) -> _Part:
    labels = make_labels(
        model, text.tokens, text.first_positions, steps=steps, tolerances=tolerances, progress=False
    )
    features, budgets, host_tokens = [], [], []
    for first, age, label in zip(text.first_positions, ages, labels, strict=True):
        _read(model, text.tokens, cache, max(int(cache.lengths[0]), first - age), chunk_tokens)
        # A copy: prefill consumes the cache.
        probed = jax.tree.map(jnp.copy, cache.sketch)
        _read(model, text.tokens, cache, first, chunk_tokens)
        cache.sketch = tuple(
            new._replace(probe_q=old.probe_q, probes=old.probes, probe_position=old.probe_position)
            for old, new in zip(probed, cache.sketch, strict=True)
        )
        for step, token in enumerate(text.tokens[first : first + steps]):
            seen, recorded = _record(model, cache, token)
            cache.adopt(seen)
            features.append(np.asarray(recorded[:, 0]))
            budgets.append(label.budget_tokens[:, :, :, step])
            host_tokens.append(label.host_tokens)
        cache.check()
    return _Part(np.stack(features), np.stack(budgets), np.asarray(host_tokens, np.int32))


def _kept(folder: Path | None, name: str) -> _Part | None:
    path = None if folder is None else folder / f"{name}.npz"
    if path is None or not path.is_file():
        return None
    with np.load(path) as arrays:
        return _Part(*(arrays[field] for field in _Part._fields))


def _keep(folder: Path | None, name: str, part: _Part) -> None:
    """Writes a file that is either whole or not there."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{name}.part.npz"
    np.savez(partial, **part._asdict())
    partial.replace(folder / f"{name}.npz")


def _read(
    model: LoadedModel, tokens: Sequence[int], cache: HostKV, until: int, chunk_tokens: int
) -> None:
    """Prefills up to a position."""
    cached = int(cache.lengths[0])
    if cached < until:
        part = list(tokens[cached:until])
        prefill(model, part, cache, chunk_tokens=chunk_tokens, progress=False)


def _record(model: LoadedModel, cache: HostKV, token: int) -> tuple[HostKV, jax.Array]:
    graph, params = nnx.split(model.model)
    return _record_step(
        graph,
        params,
        cache,
        jnp.asarray([token], jnp.int32),
        FeatureRecorder(full()),
        one_sided("host"),
        Execution(),
    )


def _recorded_step(
    graph: Any,
    params: Any,
    cache: HostKV,
    tokens: jax.Array,
    policy: Policy,
    split: Split,
    execution: Execution,
) -> tuple[HostKV, jax.Array]:
    _, cache, stats = nnx.merge(graph, params).decode_step(
        tokens, cache, policy, split=split, execution=execution
    )
    return cache, stats.notes


_record_step = jit(_recorded_step, static_argnames=("graph", "execution"))
