"""Scores of the window, against plain NumPy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import window_scores

CONSTANTS = {"scale": 0.11, "sink_tokens": 5, "newest_tokens": 16}


def log_sum_exp(x):
    return np.logaddexp.reduce(x) if x.size else -np.inf


@pytest.mark.parametrize(
    ("head_dim", "group", "slots", "dtype"),
    [
        (64, 3, 45, "float32"),
        (128, 4, 336, "bfloat16"),
        (72, 7, 33, "float16"),
        (256, 1, 20, "float32"),
    ],
)
def test_equals_numpy(head_dim, group, slots, dtype):
    """With slots in disorder, and some that hold no token but anything else."""
    rng = np.random.default_rng(0)
    batch, kv_heads = 3, 2
    # The second row has no sinks.
    positions = np.stack([rng.permutation(slots) + first for first in (0, 900, 3)])
    positions[:, rng.permutation(slots)[: slots // 5]] = -1
    keys = jnp.asarray(rng.normal(size=(batch, kv_heads, slots, head_dim)), dtype)
    keys = jnp.where((positions < 0)[:, None, :, None], jnp.nan, keys)
    q = rng.normal(size=(batch, kv_heads * group, head_dim)).astype(np.float32) * 10
    newest = positions.max(axis=1)
    got = window_scores(
        *(jnp.asarray(x) for x in (q, keys, positions, newest)),
        **CONSTANTS,
    )
    for row in range(batch):
        here = positions[row] >= 0
        position = positions[row][here]
        for head in range(kv_heads * group):
            k = np.asarray(keys[row, head // group], np.float64)[here]
            scores = 0.11 * k @ q[row, head].astype(np.float64)
            wanted = [
                scores.max(),
                log_sum_exp(scores[position < 5]),
                log_sum_exp(scores[position > newest[row] - 16]),
            ]
            np.testing.assert_allclose(got[row, head], wanted, rtol=2e-5, atol=2e-5)
    assert np.isneginf(np.asarray(got)[1, :, 1]).all()


def test_of_no_token_is_minus_infinity():
    got = window_scores(
        jnp.ones((1, 2, 8)),
        jnp.full((1, 1, 4, 8), jnp.nan),
        jnp.full((1, 4), -1),
        jnp.asarray([-1]),
        **CONSTANTS,
    )
    assert np.isneginf(np.asarray(got)).all()
