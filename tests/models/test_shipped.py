"""The model that comes with the library: where it is, what it weighs, and that it retrieves."""

from __future__ import annotations

import hashlib
import json

import pytest

import fluxion_jax as fx
from fluxion_jax.evaluation import METRICS
from fluxion_jax.evaluation.runner import task_samples
from fluxion_jax.models import load_model
from fluxion_jax.models.packaged import SHIPPED_MODEL, packaged_file

FOLDER = packaged_file(SHIPPED_MODEL)


@pytest.fixture(scope="module")
def shipped():
    return load_model(SHIPPED_MODEL)


def test_it_is_small_and_of_the_described_shape(shipped):
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 30e6
    config = shipped.config
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (
        6,
        8,
        4,
        64,
    )
    assert config.qk_norm
    assert not config.sliding_layers
    assert config.max_context_tokens >= 16_384


def test_the_weights_are_those_of_the_record():
    record = json.loads((FOLDER / "training.json").read_text())
    assert record["parameters"] == 12_195_456
    assert record["curve"][-1]["step"] == record["steps"]
    assert record["curve"][-1]["length"] == 16_384
    digest = hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest()
    assert digest == record["export_sha256"]


@pytest.mark.slow
def test_it_finds_what_is_hidden(shipped):
    samples = task_samples(shipped, "niah_multikey_2", 1536, range(3))
    result = fx.generate(
        shipped,
        [list(sample.tokens) for sample in samples],
        policy="full",
        max_new_tokens=12,
        progress=False,
    )
    for sample, row in zip(samples, result.tokens, strict=True):
        text = shipped.tokenizer.decode(row.tolist())
        assert METRICS[sample.metric](text, sample.references) == 1
