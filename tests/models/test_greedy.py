"""Greedy text of a real model, through prefill, host cache and decode, equals that of transformers.

The continuations were made with transformers in float32 from the same weights; see
`tests/goldens/make_goldens.py`. Their smallest margin between the best and the second-best logit is
far above float32 rounding, so equality is not a matter of luck.
"""

from __future__ import annotations

import numpy as np
import pytest

import fluxion_jax as fx
from fluxion_jax.models.load import load_model
from tests.goldens import load

pytestmark = [pytest.mark.model, pytest.mark.slow]


@pytest.fixture(scope="module")
def model():
    return load_model("smollm2-135m", dtype="float32")


@pytest.mark.parametrize("name", load.GREEDY)
def test_greedy_text_equals_transformers(model, name):
    golden = load.greedy(name)
    assert golden.margins.min() > 0.02
    # One capacity for all prompts, so that they share their programs.
    cache = fx.HostKV.allocate(model.config.kv_layout("float32"), batch=1, max_tokens=6144)
    result = fx.generate(
        model, golden.prompt, max_new_tokens=64, cache=cache, stop_tokens=(), progress=False
    )
    np.testing.assert_array_equal(result.tokens[0], golden.tokens)
    assert result.stats.read_fraction == 1.0
