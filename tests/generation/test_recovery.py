"""What a failure leaves behind: no trace in the summaries, and nothing lost to the caller."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fluxion_jax as fx
import host_ops
from fluxion_jax.cache.rebuild import rebuild_summaries
from fluxion_jax.models.config import ModelConfig
from fluxion_jax.models.decoder import Decoder
from tests.generation import tiny

ROWS = tiny.prompts()


def selectable(cache: fx.HostKV) -> list[np.ndarray]:
    """Exponents, and the summaries of every unit that can be selected."""
    # Copies: a view would keep the cache from being updated in place.
    arrays, capacity = [np.array(x) for x in cache.exponents], cache.num_host_blocks
    for layer in cache.summaries:
        for row, on_host in enumerate(np.asarray(cache.host_len).tolist()):
            offset = 0
            for granularity in (16, 32, 64, 128):
                units = -(-on_host // granularity)
                arrays.append(np.array(layer[row, :, offset : offset + units]))
                offset += capacity * 16 // granularity
    return arrays


def broken_model() -> Decoder:
    """The tiny model with keys far too large, and logits that are not finite."""
    model = Decoder.random(ModelConfig.tiny_llama(), 0)
    kernel = model.layers[0].attention.k.kernel
    kernel[...] = kernel[...] * 1e6
    model.norm.scale[...] = jnp.full_like(model.norm.scale[...], jnp.nan)
    return model


@pytest.mark.parametrize("summaries", ["host", "device"])
def test_a_prefill_that_fails_late_leaves_no_trace_in_the_summaries(summaries):
    layout = tiny.llama().config.kv_layout("float32", summaries=summaries)
    cache = fx.HostKV.allocate(layout, tiny.BATCH, tiny.CAPACITY_TOKENS)
    options = {"chunk_tokens": tiny.CHUNK_TOKENS, "progress": False}
    fx.prefill(tiny.llama(), ROWS, cache, **options)
    before, keys = selectable(cache), [np.asarray(x).copy() for x in cache.window_k]
    with pytest.raises(fx.FluxionError, match="expected finite logits"):
        fx.prefill(broken_model(), tiny.prompts((100, 100, 100), seed=1), cache, **options)
    cache = cache.clear_status()
    for got, want in zip(selectable(cache), before, strict=True):
        np.testing.assert_array_equal(got, want)
    for got, want in zip(cache.window_k, keys, strict=True):
        np.testing.assert_array_equal(got, want)


def test_rebuilding_changes_nothing_that_is_right():
    cache = tiny.prefilled(tiny.llama(), ROWS)
    before = jax.tree.map(np.array, (selectable(cache), cache.k, cache.v, cache.status))
    pointer = cache.k[0].unsafe_buffer_pointer()
    cache = rebuild_summaries(cache)
    after = jax.tree.map(np.array, (selectable(cache), cache.k, cache.v, cache.status))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert cache.k[0].unsafe_buffer_pointer() == pointer


@pytest.mark.native
def test_tokens_before_a_failing_step_reach_the_caller():
    whole = tiny.generate(tiny.llama(), ROWS, max_new_tokens=40)
    cache, layers = tiny.new_cache(tiny.llama()), tiny.llama().config.num_layers
    host_ops.inject_fault(host_ops.STATUS_INTERNAL, after_calls=20 * layers)
    with pytest.raises(fx.FluxionError, match="native operation failed") as failure:
        tiny.generate(tiny.llama(), ROWS, max_new_tokens=40, cache=cache)
    partial = failure.value.partial
    assert [len(row) for row in partial.tokens] == [20] * 3
    # The last token has not been fed yet: with it the generation goes on as if nothing had been.
    rest = tiny.generate(
        tiny.llama(),
        [row[-1:] for row in partial.tokens],
        max_new_tokens=20,
        cache=cache.clear_status(),
    )
    for row in range(3):
        joined = np.concatenate([partial.tokens[row], rest.tokens[row]])
        np.testing.assert_array_equal(joined, whole.tokens[row])
