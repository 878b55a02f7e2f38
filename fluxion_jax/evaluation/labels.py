"""Labels: the smallest budget of each head with which its output stays within a tolerance.

For captured steps full attention is known, so the error of every granularity and budget can be
computed. Units are ranked as the product ranks them, by integer bounds; what is ideal is only the
budget. Errors are Euclidean and normalised by the step's largest head output of the layer, so that
heads which contribute next to nothing need next to nothing.

Axes: E tolerances, D granularities, L layers, T steps, N query heads, K KV heads, G = N // K,
U units, S host tokens, H head size.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from fluxion_jax.bench.capture import Captured, capture
from fluxion_jax.bench.selection_quality import Array, Attention, full_attention, unit_scores
from fluxion_jax.cache.layout import GRANULARITIES_TOKENS, KVLayout, host_tokens
from fluxion_jax.errors import ConfigError
from fluxion_jax.models.load import LoadedModel
from fluxion_jax.policy.replay_policy import ReplayPolicy, recorded_plans
from fluxion_jax.progress import bar_options

TOLERANCES = (0.02, 0.05, 0.1, 0.2, 0.3)


@dataclasses.dataclass(frozen=True)
class Labels:
    """What each head needs in consecutive decode steps.

    Attributes:
      first_position: position of the first step's token. L are the layers with a host cache.
      tolerances: of the error, ascending.
      budget_tokens: int32 `[E, D, L, T, N]`, the smallest budget; 0 means that the window suffices.
      mass: float32 `[E, D, L, T, N]`, share of the attention mass in window and chosen units.
      window_error: float32 `[L, T, N]`, the error with the window alone.
      host_tokens: tokens that the host held.
    """

    first_position: int
    tolerances: tuple[float, ...]
    budget_tokens: npt.NDArray[np.int32]
    mass: npt.NDArray[np.float32]
    window_error: npt.NDArray[np.float32]
    host_tokens: int

    def streaming_fraction(self) -> Array:
        """Share of heads and steps for which the window suffices: float64 `[E]`."""
        return (self.window_error[None] <= self._limits(4)).mean(axis=(1, 2, 3))

    def budget_fraction(self) -> Array:
        """Mean budget as a share of the sequence: float64 `[E, D]`."""
        steps = self.first_position + 1 + np.arange(self.budget_tokens.shape[3])
        shares: Array = (self.budget_tokens / steps[:, None]).mean(axis=(2, 3, 4))
        return shares

    def policy(self, tolerance: float, layout: KVLayout) -> ReplayPolicy:
        """The oracle's plan: per group the granularity that may read the fewest bytes.

        Bytes are those of the summaries scanned and an upper bound of the K/V read, the sum over
        the group's heads. A group whose heads all stream reads nothing at any granularity.

        Args:
          tolerance: one of `tolerances`.
          layout: of the cache, from which bytes follow.

        Raises:
          ConfigError: there are no labels for this tolerance.
        """
        if tolerance not in self.tolerances:
            raise ConfigError(f"expected a tolerance of {self.tolerances}, got {tolerance}")
        budgets = self.budget_tokens[self.tolerances.index(tolerance)]
        granularities, layers, steps, heads = budgets.shape
        sizes = np.asarray(GRANULARITIES_TOKENS)
        grouped = budgets.reshape(granularities, layers, steps, layout.num_kv_heads, -1)
        read = np.minimum(grouped.sum(axis=-1), self.host_tokens)
        units = -(-self.host_tokens // sizes)[:, None, None, None] * (read > 0)
        token_bytes = 2 * layout.head_dim * layout.jax_dtype.itemsize
        cost = read * token_bytes + units * layout.unit_summary_bytes
        # Equal costs go to the coarsest unit, which is ranked fastest.
        best = granularities - 1 - np.argmin(cost[::-1], axis=0)
        per_head = np.repeat(best, heads // layout.num_kv_heads, axis=-1)
        chosen = np.take_along_axis(budgets, per_head[None], axis=0)[0]
        return recorded_plans(
            layout,
            np.asarray([self.first_position]),
            np.moveaxis(sizes[best], 1, 0)[None],
            np.moveaxis(chosen, 1, 0)[None],
        )

    def _limits(self, ndim: int) -> Array:
        return np.asarray(self.tolerances).reshape(-1, *[1] * (ndim - 1))


def make_labels(
    model: LoadedModel,
    tokens: Sequence[int],
    first_positions: Sequence[int],
    *,
    steps: int = 8,
    tolerances: Sequence[float] = TOLERANCES,
    progress: bool | None = None,
) -> list[Labels]:
    """Labels of stretches of consecutive decode steps of one text.

    The text goes through the model once with dense attention, whose memory grows with the square of
    its length.

    Args:
      model: loaded; layers that attend to everything get labels.
      tokens: the text.
      first_positions: where the stretches begin.
      steps: of each stretch; its host cache is that of its first step.
      tolerances: of the error, any number of them.
      progress: show a progress bar; None shows it on a terminal and in a notebook.

    Returns:
      One `Labels` per stretch.

    Raises:
      ConfigError: a stretch is not within the text.
    """
    layout = model.config.kv_layout("float32")
    beyond = [p for p in first_positions if host_tokens(layout, p) < 1 or p + steps > len(tokens)]
    if beyond or not first_positions:
        shortest = layout.sink_tokens + layout.recent_tokens + GRANULARITIES_TOKENS[0]
        raise ConfigError(
            f"expected stretches from {shortest} to {len(tokens) - steps}, got "
            f"{beyond[0] if beyond else 'none'}; move them into the text"
        )
    limits = tuple(sorted(tolerances))
    positions = np.concatenate([np.arange(p, p + steps) for p in first_positions])
    layers = tqdm(
        capture(model.model, np.asarray(tokens, np.int32), positions),
        total=len(layout.global_layers),
        desc="labels",
        unit="layer",
        **bar_options(progress),
    )
    sinks = layout.sink_tokens
    # NumPy lets other threads run, and the device goes on with the next layer meanwhile.
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = [
            [
                pool.submit(
                    label_layer,
                    Captured(
                        layer.q[i * steps : (i + 1) * steps],
                        layer.k[:, : first + steps],
                        layer.v[:, : first + steps],
                        layer.scale,
                    ),
                    np.arange(first, first + steps),
                    slice(sinks, sinks + host_tokens(layout, first)),
                    limits,
                )
                for i, first in enumerate(first_positions)
            ]
            for layer in layers
        ]
        labelled = [[future.result() for future in per_layer] for per_layer in found]
    return [
        Labels(
            first,
            limits,
            np.stack([budgets for budgets, _, _ in per_layer], axis=2).astype(np.int32),
            np.stack([mass for _, mass, _ in per_layer], axis=2).astype(np.float32),
            np.stack([error for _, _, error in per_layer]).astype(np.float32),
            host_tokens(layout, first),
        )
        for first, per_layer in zip(first_positions, zip(*labelled, strict=True), strict=True)
    ]


def label_layer(
    layer: Captured, positions: npt.NDArray[np.int64], host: slice, tolerances: Sequence[float]
) -> tuple[Array, Array, Array]:
    """Labels of one layer.

    Returns:
      `(budgets, mass, window_error)`: `[E, D, T, N]` twice and `[T, N]`; see `Labels`.
    """
    attention = full_attention(layer, positions, host)
    budgets, masses = [], []
    for granularity in GRANULARITIES_TOKENS:
        scores = unit_scores("integer", layer, attention, host, granularity, shared=False)
        error, mass = _curves(scores, layer, attention, host, granularity)
        # Everything is always enough, whatever rounding says.
        error[..., -1] = 0
        units = [np.argmax(error <= tolerance, axis=-1) for tolerance in tolerances]
        kept = [np.take_along_axis(mass, u[..., None], -1)[..., 0] for u in units]
        budgets.append(np.stack([_by_head(u) for u in units]) * granularity)
        masses.append(np.stack([_by_head(m) for m in kept]))
    return np.stack(budgets, axis=1), np.stack(masses, axis=1), _by_head(error[..., 0])


def _curves(
    scores: Array, layer: Captured, attention: Attention, host: slice, granularity: int
) -> tuple[Array, Array]:
    """Error and mass with the best 0, 1, ..., U units: `[K, T, G, U + 1]` each."""
    kv_heads, steps, group, tokens = attention.host.shape
    units = scores.shape[-1]
    padding = units * granularity - tokens
    weights = np.pad(attention.host, [(0, 0)] * 3 + [(0, padding)])
    weights = weights.reshape(kv_heads, steps * group, units, granularity).swapaxes(1, 2)
    values = np.pad(layer.v[:, host], [(0, 0), (0, padding), (0, 0)])
    values = values.reshape(kv_heads, units, granularity, -1)
    order = np.argsort(-scores, axis=-1, kind="stable")
    largest = np.linalg.norm(attention.full_out, axis=-1).max(axis=(0, 2))
    errors, masses = [], []
    # One KV head at a time bounds the memory.
    for k in range(kv_heads):
        parts = np.swapaxes(weights[k] @ values[k], 0, 1).reshape(steps, group, units, -1)
        parts = np.take_along_axis(parts, order[k][..., None], axis=2)
        own = weights[k].sum(axis=-1).T.reshape(steps, group, units)
        own = np.take_along_axis(own, order[k], axis=2)
        start = attention.window_out[k][:, :, None]
        out = np.concatenate([start, start + np.cumsum(parts, axis=2)], axis=2)
        mass = attention.window_mass[k][:, :, None]
        mass = np.concatenate([mass, mass + np.cumsum(own, axis=2)], axis=2)
        out /= mass[..., None]
        error = np.linalg.norm(out - attention.full_out[k][:, :, None], axis=-1)
        errors.append(error / largest[:, None, None])
        masses.append(mass)
    return np.stack(errors), np.stack(masses)


def _by_head(values: Array) -> Array:
    """`[K, T, G]` as `[T, N]`."""
    return np.moveaxis(values, 0, 1).reshape(values.shape[1], -1)
