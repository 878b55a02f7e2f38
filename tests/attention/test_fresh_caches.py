"""Fresh caches without a host part meet one compiled program, again and again."""

from __future__ import annotations

import pytest

from fluxion_jax.bench.step_programs import Stepper, random_cache, random_weights
from fluxion_jax.decode import decode_chunk
from fluxion_jax.models.config import ModelConfig
from fluxion_jax.policy import parse_policy, split_at

pytestmark = pytest.mark.native


@pytest.mark.parametrize("backend", ["any", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_fresh_caches_without_a_host_part_share_a_program(backend):
    weights = random_weights(ModelConfig.tiny_llama())
    before = decode_chunk.compilations()
    # The first call of a program is more patient than the next about where arrays lie.
    for _ in range(3):
        stepper = Stepper(weights, random_cache(weights.config, (300,), "device"))
        assert stepper.cache.host_bytes == 0
        stepper.call(parse_policy("full"), split_at(1.0), 2)
    assert decode_chunk.compilations() - before <= 1
