"""Samples of a calibration: features of heads in decode steps, and what the heads really needed.

What a text brings is kept on disk, so that a calibration that was interrupted goes on. Texts of
like length are recorded together; each is recorded as in a cache of the capacity that an evaluation
of its length takes, because the sketch's runs, and with them the features, depend on it.

Axes: S steps, L global layers, N query heads, F features, E errors, D granularities.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from fluxion_jax.cache.layout import KVLayout
from fluxion_jax.calibration.recording import record
from fluxion_jax.calibration.texts import CalibrationText
from fluxion_jax.evaluation.answers import cache_capacity
from fluxion_jax.evaluation.fingerprints import digest
from fluxion_jax.models.load import LoadedModel
from fluxion_jax.policy.features import NAMES
from fluxion_jax.progress import bar_options
from fluxion_jax.session import cache_dtype
from fluxion_jax.whole_files import replaced

SAMPLES = "samples"
"""Folder of the samples, beside the weights."""
ERRORS = (0.02, 0.035, 0.05, 0.07, 0.1, 0.14, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
"""Errors for which smallest budgets are found besides those of the tolerances: so close that the
error that a budget leaves is known to a third of itself."""

# Texts that are recorded together: a GPU is full with eight; on a processor a text by itself waits
# for no other to end.
_MOST_ROWS = {"gpu": 8}
# Of prompts on the device, and of the scores of a tile of queries where no kernel spares them.
_MOST_BYTES = 3 << 30
_TILE_TOKENS = 512


class HeadSamples(NamedTuple):
    """Steps of all heads.

    Attributes:
      features: float32 `[S, L, N, F]`.
      budget_tokens: int32 `[S, E, D, L, N]`, smallest budgets; 0 where the window suffices.
      window_error: float32 `[S, L, N]`, with the window alone.
      host_tokens: int32 `[S]`.
      text: int32 `[S]`, index of the text; its steps are consecutive.
      layers: indices in the model of the layers.
      errors: for which there are budgets, ascending.
      layout: of the cache.
    """

    features: npt.NDArray[np.float32]
    budget_tokens: npt.NDArray[np.int32]
    window_error: npt.NDArray[np.float32]
    host_tokens: npt.NDArray[np.int32]
    text: npt.NDArray[np.int32]
    layers: tuple[int, ...]
    errors: tuple[float, ...]
    layout: KVLayout

    def of(self, steps: npt.NDArray[np.bool_]) -> HeadSamples:
        """Only the steps of a bool `[S]`."""
        names = (*_Part._fields, "text")
        return self._replace(**{name: getattr(self, name)[steps] for name in names})


class _Part(NamedTuple):
    """What one text brings; see `HeadSamples`."""

    features: npt.NDArray[np.float32]
    budget_tokens: npt.NDArray[np.int32]
    window_error: npt.NDArray[np.float32]
    host_tokens: npt.NDArray[np.int32]


def collect_samples(
    model: LoadedModel,
    texts: Sequence[CalibrationText],
    *,
    tolerances: Sequence[float],
    chunk_tokens: int,
    folder: Path | None = None,
    identity: str = "",
    progress: bool | None = None,
) -> HeadSamples:
    """Runs texts through the model and looks at their last steps.

    Args:
      model: loaded.
      texts: prompts and the steps to look at.
      tolerances: of the output error; budgets are found for these and for `ERRORS`.
      chunk_tokens: tokens that one call of the product prefills.
      folder: where the samples of each text are kept, and not made again; None keeps none.
      identity: of the model, from `model_identity`; part of the names of what is kept.
      progress: show a progress bar; None shows it on a terminal and in a notebook.
    """
    errors = tuple(sorted({*tolerances, *ERRORS}))
    layout = model.config.kv_layout(cache_dtype(model.model), sketch=True)
    slots = max(text.steps for text in texts)
    names = [
        digest(
            identity=identity,
            features=NAMES,
            text=text._asdict(),
            how=(errors, chunk_tokens, layout.dtype),
        )
        for text in texts
    ]
    found = [_kept(folder, name) for name in names]
    missing: dict[int, list[int]] = defaultdict(list)
    for i, part in enumerate(found):
        if part is None:
            missing[texts[i].length_tokens].append(i)
    bar = tqdm(total=len(texts), desc="samples", unit="text", **bar_options(progress))
    bar.update(len(texts) - sum(map(len, missing.values())))
    for length, indices in missing.items():
        rows = _rows(layout, length)
        capacity = cache_capacity(length, length)
        # Texts of as many steps together: the others of a batch wait for the longest.
        ordered = sorted(indices, key=lambda i: -texts[i].steps)
        for start in range(0, len(ordered), rows):
            own = ordered[start : start + rows]
            bar.set_postfix_str(f"{length} tokens")
            # A batch of another size would be another program.
            asked = [texts[i] for i in own] + [texts[own[0]]] * (rows - len(own))
            recorded = record(
                model.model,
                asked,
                slots=slots,
                errors=errors,
                layout=layout,
                capacity_tokens=capacity,
                chunk_tokens=chunk_tokens,
                stop_tokens=model.tokenizer.eos_ids if model.tokenizer else (),
            )
            for row, i in enumerate(own):
                steps = recorded.running[:, row]
                part = _Part(*(x[:, row][steps] for x in recorded[: len(_Part._fields)]))
                found[i] = part
                _keep(folder, names[i], part)
            bar.update(len(own))
    bar.close()
    parts = [part for part in found if part is not None]
    steps = [len(part.host_tokens) for part in parts]
    whole = _Part(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    return HeadSamples(
        **whole._asdict(),
        text=np.repeat(np.arange(len(parts)), steps).astype(np.int32),
        layers=layout.global_layers,
        errors=errors,
        layout=layout,
    )


def _rows(layout: KVLayout, length_tokens: int) -> int:
    """Texts that are recorded together."""
    assert layout.num_heads is not None
    prompt = 2 * layout.num_layers * layout.num_kv_heads * layout.head_dim
    # Bounds of blocks are float32, an eighth of a key and value each.
    row = prompt * (layout.jax_dtype.itemsize + 0.5) + 4 * layout.num_heads * _TILE_TOKENS
    most = _MOST_ROWS.get(jax.default_backend(), 1)
    return int(np.clip(_MOST_BYTES // (row * length_tokens), 1, most))


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
    with replaced(folder / f"{name}.npz") as file:
        np.savez(file, **part._asdict())
