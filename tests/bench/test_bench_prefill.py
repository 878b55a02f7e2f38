"""The prefill benchmark at a tiny size."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxion_jax.bench.prefill import Settings, _resident_chunk, render, run
from fluxion_jax.bench.random_arrays import random_array
from fluxion_jax.bench.step_programs import random_weights
from fluxion_jax.models.config import ModelConfig


def test_a_tiny_run_has_every_figure(tmp_path):
    settings = Settings(ModelConfig.tiny_llama(), 1500, 64, positions=3, calls=2)
    report = run(settings, tmp_path)
    json.dumps(report, allow_nan=False)
    host, device = report["rows"]
    assert (host["place"], device["place"]) == ("host", "device")
    for row in report["rows"]:
        medians = [c["median"] for c in row["chunk_s"]]
        chunks = settings.context_tokens / settings.chunk_tokens
        assert min(medians) <= row["total_s"] / chunks <= max(medians)
    assert report["over_device"] == pytest.approx(host["total_s"] / device["total_s"])
    assert len(render(report).splitlines()) == 4
    said = []
    assert run(settings, tmp_path, said.append)["rows"] == report["rows"]
    assert said == []


def test_the_resident_chunk_continues_a_sequence():
    """Two chunks equal one of both, so that what is timed is attention to all that came before."""
    config = ModelConfig.tiny_llama()
    graph, params, _ = random_weights(config, jnp.float32)
    shape = (1, config.num_kv_heads, 96, config.head_dim)
    empty = tuple(random_array(shape, jnp.float32, "device", i) for i in range(config.num_layers))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 64)))
    read = jax.jit(_resident_chunk, static_argnums=0)
    _, _, whole = read(graph, params, tokens, empty, empty, jnp.asarray(0))
    k, v, _ = read(graph, params, tokens[:, :32], empty, empty, jnp.asarray(0))
    _, _, second = read(graph, params, tokens[:, 32:], k, v, jnp.asarray(32))
    np.testing.assert_allclose(second, whole, atol=1e-4)
