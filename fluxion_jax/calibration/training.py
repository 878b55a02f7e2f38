"""Training the predictor: class and budgets weigh by the error that is left where they fall short.

Too small a budget costs quality and too large a one only bytes. How much quality is known: samples
hold the smallest budgets for a dozen errors, so the error that is left below a budget is a step
function. A head that needs the host weighs in the class's cross-entropy by how far the window's
error exceeds the tolerance; a budget that is too small costs the integral of that excess over the
logarithm of what is missing. Every sample is met at a tolerance drawn afresh.

Axes: S samples (one head in one layer at one step), E errors, D granularities, F features.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from flax import nnx
from tqdm import tqdm

from fluxion_jax.cache.layout import GRANULARITIES_TOKENS
from fluxion_jax.calibration.rating import Predictions
from fluxion_jax.calibration.samples import HeadSamples
from fluxion_jax.policy.features import NUM_FEATURES
from fluxion_jax.policy.head_predictor import HeadPredictor, Statistics
from fluxion_jax.progress import bar_options

# A doubling too much, against an error of 1 left over a doubling too little.
_OVER, _ERROR = 0.1, 4.0
# What falls short counts for the under-budget rate even if next to no error is left.
_SHORT = 0.3
# A head that needs the host although next to no error is left, against one that does not; and how
# much more it weighs where an error of 1 is left.
_NEEDED, _NEEDED_ERROR = 0.2, 10.0
_BATCH = 1024
_PEAK_RATE = 2e-3
_WEIGHT_DECAY = 1e-2
_STEPS_PER_CALL = 50
# A feature that never changed says nothing, and where it does change nobody knows what it means.
_NEVER_CHANGED = 1e-5
_IGNORED = 1e9
DOUBLINGS = np.log2(np.asarray(GRANULARITIES_TOKENS) / GRANULARITIES_TOKENS[0]).astype(np.float32)


class FlatSamples(NamedTuple):
    """Samples one after another.

    Attributes:
      features: float32 `[S, F]`.
      layer: int32 `[S]`, index in the model.
      head: int32 `[S]`.
      needed: float32 `[S, E, D]`, log2 of the budget over the host's tokens; `-inf` for streaming.
      window_error: float32 `[S]`, with the window alone.
      host_tokens: int32 `[S]`.
    """

    features: npt.NDArray[np.float32]
    layer: npt.NDArray[np.int32]
    head: npt.NDArray[np.int32]
    needed: npt.NDArray[np.float32]
    window_error: npt.NDArray[np.float32]
    host_tokens: npt.NDArray[np.int32]


def flatten(samples: HeadSamples) -> FlatSamples:
    """One row per head, layer and step, in this order of axes: step, layer, head."""
    steps, layers, heads, _ = samples.features.shape
    budgets = np.moveaxis(samples.budget_tokens, (3, 4), (1, 2)).astype(np.float64)
    host = samples.host_tokens[:, None, None, None, None]
    with np.errstate(divide="ignore"):
        needed = np.log2(budgets / host)
    return FlatSamples(
        samples.features.reshape(-1, NUM_FEATURES),
        np.tile(np.repeat(samples.layers, heads), steps).astype(np.int32),
        np.tile(np.arange(heads), steps * layers).astype(np.int32),
        needed.reshape(-1, *needed.shape[3:]).astype(np.float32),
        samples.window_error.reshape(-1),
        np.repeat(samples.host_tokens, layers * heads),
    )


def train_predictor(
    data: FlatSamples,
    errors: npt.NDArray[np.float32],
    num_tolerances: int,
    num_layers: int,
    num_heads: int,
    *,
    num_steps: int,
    seed: int,
    progress: bool | None = None,
) -> tuple[HeadPredictor, list[float]]:
    """Trains a predictor from random weights.

    Args:
      data: the training part.
      errors: float32 `[E]`, of the labels, ascending.
      num_tolerances: the first so many of them are tolerances to train for.
      num_layers: of the model.
      num_heads: query heads of a layer.
      num_steps: of the optimiser, in batches of 1,024 samples.
      seed: of weights and batches.
      progress: show a progress bar; None shows it on a terminal and in a notebook.

    Returns:
      The predictor, and the mean loss of each run of 50 steps.
    """
    predictor = HeadPredictor(num_layers, num_heads, rngs=nnx.Rngs(seed))
    deviation = data.features.std(axis=0)
    predictor.mean[...] = jnp.asarray(data.features.mean(axis=0))
    predictor.deviation[...] = jnp.asarray(
        np.where(deviation > _NEVER_CHANGED, deviation, _IGNORED), jnp.float32
    )
    parts: Any = nnx.split(predictor, nnx.Param, Statistics)
    graph, params, rest = parts
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, _PEAK_RATE, max(1, num_steps // 20), num_steps, 0.0
    )
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=_WEIGHT_DECAY)
    )
    arrays = tuple(jnp.asarray(x) for x in data)

    def loss_of(params: Any, arrays: tuple[jax.Array, ...], key: jax.Array) -> jax.Array:
        rows_key, tolerance_key = jax.random.split(key)
        rows = jax.random.randint(rows_key, (_BATCH,), 0, len(arrays[0]))
        features, layer, head, needed, window_error, host_tokens = (x[rows] for x in arrays)
        which = jax.random.randint(tolerance_key, (_BATCH,), 0, num_tolerances)
        model = nnx.merge(graph, params, rest)
        tolerance = jnp.asarray(errors)[which]
        needs = model(features, model.heads[...][layer, head], tolerance)
        # No budget is smaller than half the finest unit, or the logarithm would have no end.
        least = jnp.log2(GRANULARITIES_TOKENS[0] / 2 / host_tokens)
        needed = jnp.maximum(needed, least[:, None, None])
        wanted = jnp.take_along_axis(needed, which[:, None, None], axis=1)[:, 0]
        streaming = window_error <= tolerance
        excess = jnp.maximum(window_error - tolerance, 0.0)
        weight = jnp.where(streaming, 1.0, _NEEDED + _NEEDED_ERROR * excess)
        class_loss = weight * optax.sigmoid_binary_cross_entropy(
            needs.streaming, streaming.astype(jnp.float32)
        )
        given = needs.log2_fraction(DOUBLINGS)
        left = error_left(given, needed, jnp.asarray(errors), window_error, which)
        budget_loss = (
            _OVER * jnp.maximum(given - wanted, 0.0)
            + _OVER * _SHORT * jnp.maximum(wanted - given, 0.0)
            + _ERROR * left
        ).mean(axis=-1)
        return (class_loss + jnp.where(streaming, 0.0, budget_loss)).mean()

    # The samples are an argument: as constants they would be part of the program.
    @jax.jit
    def run(carry: Any, arrays: tuple[jax.Array, ...], keys: jax.Array) -> tuple[Any, jax.Array]:
        def step(
            carry: tuple[Any, optax.OptState], key: jax.Array
        ) -> tuple[tuple[Any, optax.OptState], jax.Array]:
            params, state = carry
            loss, gradients = jax.value_and_grad(loss_of)(params, arrays, key)
            updates, state = optimiser.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, carry, keys)

    carry = (params, optimiser.init(params))
    keys = jax.random.split(jax.random.key(seed), num_steps)
    losses = []
    with tqdm(total=num_steps, desc="training", unit="step", **bar_options(progress)) as bar:
        for start in range(0, num_steps, _STEPS_PER_CALL):
            part = keys[start : start + _STEPS_PER_CALL]
            carry, found = run(carry, arrays, part)
            losses.append(float(found.mean()))
            bar.update(len(part))
            bar.set_postfix_str(f"loss {losses[-1]:.3f}")
    return nnx.merge(graph, carry[0], rest), losses


def error_left(
    given: jax.Array, needed: jax.Array, errors: jax.Array, window_error: jax.Array, which: Any
) -> jax.Array:
    """The error beyond a tolerance, integrated over the logarithm of what budgets are too small by.

    Args:
      given: float32 `[S, D]`, log2 of budgets.
      needed: float32 `[S, E, D]`, log2 of the smallest budgets, falling along E.
      errors: float32 `[E]`, ascending.
      window_error: float32 `[S]`, which no budget exceeds.
      which: int32 `[S]`, the tolerance's place in `errors`.

    Returns:
      float32 `[S, D]`.
    """
    # Between two of the budgets the error is at most the larger of theirs.
    below = jnp.concatenate([needed[:, 1:], jnp.full_like(needed[:, :1], -jnp.inf)], axis=1)
    beyond = jnp.minimum(jnp.append(errors[1:], jnp.inf), window_error[:, None])
    excess = jnp.maximum(beyond - errors[which][:, None], 0.0)
    excess = jnp.where(jnp.arange(len(errors)) >= which[:, None], excess, 0.0)
    missing = jnp.maximum(needed - jnp.maximum(given[:, None], below), 0.0)
    return (excess[..., None] * missing).sum(axis=1)


def predict(
    predictor: HeadPredictor, data: FlatSamples, tolerance: float, shape: tuple[int, ...]
) -> Predictions:
    """Predictions for samples that are steps, layers and heads of this shape."""
    graph, state = nnx.split(predictor)
    logits, fractions = [], []
    for start in range(0, len(data.features), 1 << 16):
        part = slice(start, start + (1 << 16))
        logit, fraction = _predict(
            graph,
            state,
            jnp.asarray(data.features[part]),
            jnp.asarray(data.layer[part]),
            jnp.asarray(data.head[part]),
            jnp.asarray(tolerance, jnp.float32),
        )
        logits.append(np.asarray(logit))
        fractions.append(np.asarray(fraction))
    return Predictions(
        np.concatenate(logits).reshape(shape), np.concatenate(fractions).reshape(*shape, -1)
    )


@functools.partial(jax.jit, static_argnums=0)
def _predict(
    graph: nnx.GraphDef[HeadPredictor],
    state: Any,
    features: jax.Array,
    layer: jax.Array,
    head: jax.Array,
    tolerance: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    model = nnx.merge(graph, state)
    needs = model(features, model.heads[...][layer, head], tolerance)
    return needs.streaming, needs.log2_fraction(DOUBLINGS)
