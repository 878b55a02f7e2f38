"""Programs for a GPU leave arrays in pinned memory to kernels and foreign calls.

XLA would compute with them on the host, and search for all that follows in exponential time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import fluxion_jax as fx
from fluxion_jax.decode import decode_chunk, prefill_chunk
from fluxion_jax.models.config import ModelConfig
from fluxion_jax.models.decoder import Decoder
from fluxion_jax.policy import parse_split
from tests.host_memory import computed_with, traced_for_gpu

pytestmark = pytest.mark.native
CONFIG = ModelConfig.tiny_llama()


def model_and_cache(summaries):
    graph, params = nnx.split(Decoder.random(CONFIG))
    layout = fx.KVLayout(
        CONFIG.num_layers, CONFIG.num_kv_heads, CONFIG.head_dim, "float32", summaries=summaries
    )
    return graph, params, fx.HostKV.allocate(layout, 1, 1200)


@pytest.mark.parametrize("summaries", ["host", "device"])
@pytest.mark.parametrize("split", ["host", "device", "model"])
@pytest.mark.parametrize("device", ["triton", "mosaic"])
def test_decoding(summaries, split, device):
    arguments = (
        *model_and_cache(summaries),
        *(jnp.zeros((1,), jnp.int32), jnp.zeros((1,), bool), jnp.full((1, 4), -1)),
        *(jnp.asarray(4), jnp.asarray([-1]), jax.random.key(0), fx.parse_policy("fixed:16:0.05")),
        *(parse_split(split), fx.greedy(), fx.Execution(host="native", device=device)),
    )
    assert computed_with(traced_for_gpu(decode_chunk.trace, *arguments)) == []


@pytest.mark.parametrize("summaries", ["host", "device"])
def test_prefill(summaries):
    tokens, count = jnp.zeros((1, 64), jnp.int32), jnp.full((1,), 64, jnp.int32)
    arguments = (*model_and_cache(summaries), tokens, count, fx.Execution(host="native"))
    assert computed_with(traced_for_gpu(prefill_chunk.trace, *arguments)) == []


def test_xla_over_pinned_blocks_is_refused_by_name():
    arguments = (
        *model_and_cache("host"),
        *(jnp.zeros((1,), jnp.int32), jnp.zeros((1,), bool), jnp.full((1, 4), -1)),
        *(jnp.asarray(4), jnp.asarray([-1]), jax.random.key(0), fx.full()),
        *(parse_split("device"), fx.greedy(), fx.Execution(host="native", device="xla")),
    )
    with pytest.raises(fx.UnsupportedError, match=r"read pinned host memory on a GPU, got 'xla'"):
        traced_for_gpu(decode_chunk.trace, *arguments)


def test_the_search_finds_what_it_is_for():
    cache = model_and_cache("host")[2]

    @fx.jit
    def program(cache: fx.HostKV) -> jax.Array:
        def body(i, total):
            return total + jax.lax.dynamic_index_in_dim(cache.k[0], i, 2)

        return jax.lax.fori_loop(0, 2, body, jax.lax.slice_in_dim(cache.k[0], 0, 1, axis=2))

    assert set(computed_with(traced_for_gpu(lambda c: jax.jit(program).trace(c), cache))) >= {
        "slice"
    }
