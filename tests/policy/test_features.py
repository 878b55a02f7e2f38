from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from feature_reference import host_tokens, row_features

import fluxion_jax as fx
from fluxion_jax.cache import sketch as sketches
from fluxion_jax.cache.sketch import PROBES
from fluxion_jax.policy.features import FAMILIES, NAMES, NUM_FEATURES
from fluxion_jax.policy.split import one_sided
from tests.policy.recorder import FeatureRecorder

LENGTHS = [700, 471, 90]
BATCH, CAPACITY, KV_HEADS, HEADS, HEAD_DIM, LAYERS = 3, 832, 2, 6, 32, 1
SCALE = 0.3


@fx.jit
def recorded_step(cache, q, k_new, v_new, policy):
    _, cache, stats = fx.decode_attention(
        q,
        k_new,
        v_new,
        cache,
        0,
        policy,
        scale=SCALE,
        split=one_sided("host"),
        execution=fx.Execution(host="xla"),
    )
    return cache.advance(), stats.notes


def draw(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries of two steps `[2, B, N, H]`, keys and values `[B, S, K, H]`."""
    rng = np.random.default_rng(seed)
    kv = (BATCH, max(LENGTHS) + 2, KV_HEADS, HEAD_DIM)
    k = rng.standard_normal(kv) + rng.standard_normal(kv[2:])
    v = rng.standard_normal(kv) * rng.uniform(0.2, 3.0, (BATCH, kv[1], 1, 1))
    q = rng.standard_normal((2, BATCH, HEADS, HEAD_DIM)) * 1.5
    return tuple(x.astype(np.float32) for x in (q, k, v))


def filled(k: np.ndarray, v: np.ndarray) -> fx.HostKV:
    layout = fx.KVLayout(LAYERS, KV_HEADS, HEAD_DIM, "float32", num_heads=HEADS, sketch=True)
    longest = max(LENGTHS)
    return fx.HostKV.from_arrays(layout, [k[:, :longest]], [v[:, :longest]], LENGTHS, CAPACITY)


@pytest.mark.parametrize("max_runs", [512, 9])
def test_features_equal_an_independent_reference(max_runs, monkeypatch):
    monkeypatch.setattr(sketches, "MAX_RUNS", max_runs)
    blocks = -(-host_tokens(CAPACITY) // 128) * 8
    run_tokens = 16 * -(-blocks // max_runs)
    q, k, v = draw()
    cache = filled(k, v)
    rng = np.random.default_rng(1)
    probes = rng.standard_normal((BATCH, HEADS, len(PROBES))).astype(np.float32)
    probe_q = rng.standard_normal((BATCH, HEADS, HEAD_DIM)).astype(np.float32)
    # The first row was probed, the others never.
    probe_position = np.asarray([650, -1, -1], np.int32)
    cache.sketch = tuple(
        s._replace(
            probes=jnp.asarray(probes),
            probe_q=jnp.asarray(probe_q),
            probe_position=jnp.asarray(probe_position),
        )
        for s in cache.sketch
    )
    previous: list[dict] = [{"previous_q": None, "previous_lse": None}] * BATCH
    # A different chunk limit is a different program: it is read when the step is traced.
    step = fx.jit(
        lambda cache, q, k_new, v_new, policy: recorded_step.__wrapped__(
            cache, q, k_new, v_new, policy
        )
    )
    rows = np.arange(BATCH)
    for i in range(2):
        lengths = np.asarray(LENGTHS) + i
        new = [jnp.asarray(x[rows, lengths]) for x in (k, v)]
        cache, seen = step(cache, jnp.asarray(q[i]), *new, FeatureRecorder(fx.full()))
        assert seen.shape == (BATCH, HEADS, NUM_FEATURES)
        for row in rows:
            length = int(lengths[row])
            state = {
                **previous[row],
                "probes": probes[row],
                "probe_q": probe_q[row],
                "probe_position": int(probe_position[row]) if probe_position[row] >= 0 else None,
            }
            expected = row_features(
                q[i, row].astype(float),
                k[row, : length + 1].astype(float),
                v[row, : length + 1].astype(float),
                length,
                run_tokens,
                SCALE,
                0,
                LAYERS,
                state,
                PROBES,
            )
            got = np.asarray(seen[row])
            for n in range(HEADS):
                wanted = np.asarray([expected[n][name] for name in NAMES])
                bad = ~np.isclose(got[n], wanted, rtol=2e-4, atol=2e-4)
                assert not bad.any(), [
                    (NAMES[j], got[n, j], wanted[j]) for j in np.flatnonzero(bad)
                ]
        window_lse = np.asarray(cache.sketch[0].previous_lse)
        previous = [
            {"previous_q": q[i, row], "previous_lse": window_lse[row, lengths[row] % 2]}
            for row in rows
        ]


def test_the_names_are_those_of_the_table():
    assert len(set(NAMES)) == NUM_FEATURES == 57
    assert len(FAMILIES) == 7


def test_a_cache_without_a_sketch_is_refused():
    q, k, v = draw()
    layout = fx.KVLayout(LAYERS, KV_HEADS, HEAD_DIM, "float32")
    cache = fx.HostKV.from_arrays(layout, [k[:, :400]], [v[:, :400]], [400] * BATCH, CAPACITY)
    with pytest.raises(fx.ConfigError, match="expected a cache that keeps a sketch"):
        recorded_step(
            cache,
            jnp.asarray(q[0]),
            jnp.asarray(k[:, 400]),
            jnp.asarray(v[:, 400]),
            FeatureRecorder(fx.full()),
        )
