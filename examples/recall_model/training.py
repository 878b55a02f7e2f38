"""The curriculum, the learning rate, and a training step as one program per stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from recall_model.batches import ANSWER, TEXT

TEXT_WEIGHT = 0.5
PEAK_RATE, CONTINUED_PEAK_RATE = 2e-3, 1.5e-3
_WARM_UP = 0.03
_DECAY_FROM = 0.6
_LAST_SHARE = 0.02
# Steps over which the learning rate returns after a resumption without its moments.
RESUME_STEPS = 100


class Stage(NamedTuple):
    """Part of the curriculum: sequences of `length` tokens, `rows` a step, a share of the time."""

    length: int
    rows: int
    share: float


STAGES = (
    Stage(256, 128, 0.20),
    Stage(1024, 64, 0.20),
    Stage(4096, 32, 0.28),
    Stage(16_384, 16, 0.32),
)
# For a model that has learned to look up already: long sequences, and small steps of them.
CONTINUED_STAGES = (Stage(1024, 64, 0.08), Stage(4096, 32, 0.32), Stage(16_384, 8, 0.60))


def learning_rate(
    peak_rate: float, progress: float, steps_since_start: int, fresh_moments: bool
) -> float:
    """Rate at a fraction of the training time: warm-up, constant, linear decay."""
    rate = peak_rate * min(1.0, (progress + 1e-4) / _WARM_UP)
    if progress > _DECAY_FROM:
        left = max(0.0, (1 - progress) / (1 - _DECAY_FROM))
        rate = peak_rate * (_LAST_SHARE + (1 - _LAST_SHARE) * left)
    if fresh_moments:
        rate *= min(1.0, (steps_since_start + 1) / RESUME_STEPS)
    return rate


def optimizer() -> optax.GradientTransformation:
    """AdamW without its learning rate; matrices decay, norm scales do not."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(0.05, mask=lambda params: jax.tree.map(_is_matrix, params)),
    )


def _is_matrix(leaf: Any) -> bool:
    return bool(leaf.ndim > 1)


def _targets(tokens: jax.Array, kinds: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Inputs, next tokens and their kinds; the last position has no target."""
    inputs = tokens.astype(jnp.int32)
    targets = jnp.roll(inputs, -1, axis=1)
    kinds = jnp.roll(kinds, -1, axis=1).at[:, -1].set(0)
    return inputs, targets, kinds


def _losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def make_step(
    graph: Any, *, micro_rows: int, dtype: Any, implementation: str
) -> Callable[..., tuple[Any, Any, dict[str, jax.Array]]]:
    """A jitted step `(params, moments, tokens, kinds, rate) -> params, moments, metrics`.

    Params and moments are donated. The loss is `0.5 * text + answers`, each a mean over its own
    tokens; a sequence with n answer tokens counts by the square root of n, so that tasks with
    short answers are heard.
    """
    update = optimizer().update

    def summed(params: Any, batch: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        inputs, targets, kinds, weights = batch
        model = nnx.merge(graph, params)
        logits = model(inputs, dtype=dtype, implementation=implementation)
        losses = _losses(logits, targets)
        right = jnp.argmax(logits, axis=-1) == targets
        answers, text = kinds == ANSWER, kinds == TEXT
        sums = [
            jnp.sum(losses * text),
            jnp.sum(text),
            jnp.sum(losses * answers),
            jnp.sum(right & answers),
            jnp.sum(answers),
        ]
        return jnp.sum(losses * weights), jnp.stack([s.astype(jnp.float32) for s in sums])

    def step(
        params: Any, moments: Any, tokens: jax.Array, kinds: jax.Array, rate: jax.Array
    ) -> tuple[Any, Any, dict[str, jax.Array]]:
        inputs, targets, kinds = _targets(tokens, kinds)
        answers = (kinds == ANSWER).astype(jnp.float32)
        per_row = jnp.maximum(jnp.sum(answers, axis=1, keepdims=True), 1)
        answers = answers * per_row**-0.5
        answers = answers / jnp.maximum(jnp.sum(answers), 1e-6)
        text = (kinds == TEXT).astype(jnp.float32)
        text = text / jnp.maximum(jnp.sum(text), 1)
        weights = TEXT_WEIGHT * text + answers
        batch = (inputs, targets, kinds, weights)
        split = jax.tree.map(lambda x: x.reshape(-1, micro_rows, *x.shape[1:]), batch)
        gradient = jax.grad(summed, has_aux=True)

        def accumulate(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(params, part)), None

        if tokens.shape[0] == micro_rows:
            grads, sums = gradient(params, batch)
        else:
            zeros = (jax.tree.map(jnp.zeros_like, params), jnp.zeros(5))
            (grads, sums), _ = jax.lax.scan(accumulate, zeros, split)
        changes, moments = update(grads, moments, params)
        params = jax.tree.map(lambda p, c: p - rate * c, params, changes)
        metrics = {
            "text_loss": sums[0] / jnp.maximum(sums[1], 1),
            "answer_loss": sums[2] / jnp.maximum(sums[4], 1),
            "answer_accuracy": sums[3] / jnp.maximum(sums[4], 1),
            "gradient_norm": optax.global_norm(grads),
        }
        return params, moments, metrics

    return jax.jit(step, donate_argnums=(0, 1))


def make_scorer(
    graph: Any, *, dtype: Any, implementation: str
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """A jitted `(params, tokens, kinds) -> right, loss`, both `[B]`.

    `right` says whether every answer token of a row is the likeliest given all before it; `loss`
    is the mean over the row's tokens of any kind.
    """

    def score(params: Any, tokens: jax.Array, kinds: jax.Array) -> tuple[jax.Array, jax.Array]:
        inputs, targets, kinds = _targets(tokens, kinds)
        logits = nnx.merge(graph, params)(inputs, dtype=dtype, implementation=implementation)
        counted = kinds > 0
        right = jnp.all((jnp.argmax(logits, axis=-1) == targets) | ~counted, axis=1)
        losses = jnp.sum(_losses(logits, targets) * counted, axis=1)
        return right, losses / jnp.maximum(jnp.sum(counted, axis=1), 1)

    return jax.jit(score)
