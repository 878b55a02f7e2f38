from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fluxion_jax.policy.features import NUM_FEATURES
from fluxion_jax.policy.head_predictor import HeadPredictor, Statistics


def count(module, kind) -> int:
    return sum(x.size for x in jax.tree.leaves(nnx.state(module, kind)))


def test_sizes_are_those_of_the_paper():
    # Llama-3.1-8B: the head vectors come on top of the network.
    predictor = HeadPredictor(32, 32, rngs=nnx.Rngs(0))
    vectors = predictor.heads[...].size
    assert 0.10e6 < count(predictor, nnx.Param) - vectors < 0.12e6
    assert vectors == 32 * 32 * 8
    assert count(predictor, Statistics) == 2 * NUM_FEATURES


def test_shapes_and_the_meaning_of_outputs():
    predictor = HeadPredictor(3, 6, rngs=nnx.Rngs(0))
    features = jax.random.normal(jax.random.key(0), (2, 6, NUM_FEATURES))
    needs = predictor(features, predictor.heads[1], jnp.float32(0.1))
    assert all(x.shape == (2, 6) for x in needs)
    assert (needs.growth >= 0).all()
    lines = needs.log2_fraction(jnp.arange(4.0))
    assert lines.shape == (2, 6, 4)
    np.testing.assert_allclose(lines[..., 0], needs.base)
    np.testing.assert_allclose(
        jnp.diff(lines, axis=-1), needs.growth[..., None] * jnp.ones(3), atol=1e-5
    )


def test_every_input_counts():
    predictor = HeadPredictor(3, 6, rngs=nnx.Rngs(0))
    features = jax.random.normal(jax.random.key(0), (6, NUM_FEATURES))
    base = predictor(features, predictor.heads[1], jnp.float32(0.1))
    for changed in (
        predictor(features, predictor.heads[1], jnp.float32(0.2)),
        predictor(features, predictor.heads[2], jnp.float32(0.1)),
        predictor(features + 0.1, predictor.heads[1], jnp.float32(0.1)),
    ):
        assert (changed.base != base.base).all()


def test_features_are_standardised_and_outliers_bounded():
    predictor = HeadPredictor(1, 1, rngs=nnx.Rngs(0))
    predictor.mean[...] = jnp.full((NUM_FEATURES,), 5.0)
    predictor.deviation[...] = jnp.full((NUM_FEATURES,), 2.0)

    def at(value: float) -> float:
        features = jnp.full((1, NUM_FEATURES), value)
        return float(predictor(features, predictor.heads[0], jnp.float32(0.1)).base[0])

    assert at(5.0 + 12.0) == at(1e9)
    assert at(5.0 + 12.0) != at(5.0 + 11.0)
