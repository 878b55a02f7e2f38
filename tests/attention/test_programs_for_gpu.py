"""Programs for a GPU leave arrays in pinned memory to kernels and foreign calls.

XLA would compute with them on the host, and search for all that follows in exponential time.
"""

from __future__ import annotations

import collections
import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import fluxion_jax as fx
from fluxion_jax.bench.replayed import random_predictor
from fluxion_jax.chunk_attention import prefill_attention
from fluxion_jax.decode import decode_chunk, prefill_chunk
from fluxion_jax.models.config import ModelConfig
from fluxion_jax.models.decoder import Decoder
from fluxion_jax.policy import parse_split
from fluxion_jax.policy.protocol import needs_sketch
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


def looped(summaries, split, device):
    """A chunk of a prompt and a step, layers in a scan over a stacked cache."""
    layout = fx.KVLayout(3, 2, 64, "bfloat16", summaries=summaries)
    cache = fx.HostKV.allocate(layout, 2, 1200, stacked=True)
    execution = fx.Execution(host="native", device=device, dense_below_tokens=0)

    @fx.jit
    def run(cache, q, kv, count, policy, split):
        def prefill(cache, layer):
            out, cache = prefill_attention(
                q, kv, kv, count, cache, layer, scale=0.1, implementation="native"
            )
            return cache, out

        def decode(cache, layer):
            out, cache, _ = fx.decode_attention(
                q[:, 0], kv[:, 0], kv[:, 0], cache, layer, policy,
                scale=0.1, split=split, execution=execution,
            )  # fmt: skip
            return cache, out

        cache, prefilled = jax.lax.scan(prefill, cache, jnp.arange(3))
        cache, decoded = jax.lax.scan(decode, cache.advance(count), jnp.arange(3))
        return cache.advance(), prefilled, decoded

    q, kv = jnp.zeros((2, 8, 4, 64)), jnp.zeros((2, 8, 2, 64))
    policy = fx.parse_policy("fixed:16:0.05")
    count = jnp.asarray([8, 3], jnp.int32)
    return traced_for_gpu(run.trace, cache, q, kv, count, policy, parse_split(split))


@pytest.mark.parametrize("summaries", ["host", "device"])
@pytest.mark.parametrize("split", ["host", "device", "0.5"])
@pytest.mark.parametrize("device", ["triton", "mosaic", "triton_mma", "wgmma"])
def test_loops_over_layers(summaries, split, device):
    assert computed_with(looped(summaries, split, device)) == []


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


# XLA makes kernels of their own of these; elementwise operations share one.
KERNELS = {
    *("pallas_call", "ffi_call", "dot_general", "scatter", "gather", "sort", "cumsum"),
    *("while", "scan", "cond", "concatenate", "dynamic_update_slice", "argmax", "top_k"),
}


def kernels(jaxpr):
    """How often a program has an operation that XLA makes a kernel of, by name."""
    found = collections.Counter()
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in KERNELS or name.startswith("reduce_"):
            found[name] += 1
        if name not in ("pallas_call", "ffi_call"):
            for body in (eqn.params[key] for key in ("jaxpr", "call_jaxpr") if key in eqn.params):
                found += kernels(getattr(body, "jaxpr", body))
    return found


def attention_of(layers, summaries, policy="fixed:16:0.05:group"):
    """Attention of some layers, one after the other."""
    execution = fx.Execution(host="native", dense_below_tokens=0)
    policy = fx.parse_policy(policy) if isinstance(policy, str) else policy
    sketch = needs_sketch(policy)
    layout = fx.KVLayout(layers, 8, 128, summaries=summaries, num_heads=32, sketch=sketch)
    cache = fx.HostKV.allocate(layout, 1, 4096)
    q, kv = jnp.zeros((1, 32, 128)), jnp.zeros((1, 8, 128))

    @fx.jit
    def step(cache, q, k, v, policy, split):
        for layer in range(layers):
            q, cache, _ = fx.decode_attention(
                q, k, v, cache, layer, policy, scale=0.1, split=split, execution=execution
            )
        return q, cache.advance()

    return traced_for_gpu(step.trace, cache, q, kv, kv, policy, parse_split("model"))


@pytest.mark.parametrize("summaries", ["host", "device"])
def test_a_layer_has_few_kernels(summaries):
    """A kernel takes longer to start than most of those between two layers take to run."""
    layer = kernels(attention_of(2, summaries)) - kernels(attention_of(1, summaries))
    # The work, the query, scores, selection, list, attention, its merge, the window, and the end.
    assert layer["pallas_call"] == 9
    # Submit and collect; and a hand-over of each array on either side of collect.
    assert layer["ffi_call"] == 2 + 2 * (2 if summaries == "device" else 3)
    # The window's masks and positions, which XLA drops where no policy looks at them.
    assert other_kernels(layer) == {"concatenate": 3}


def other_kernels(layer):
    return {name: n for name, n in layer.items() if name not in ("pallas_call", "ffi_call")}


def test_a_planned_layer_has_seven_kernels_more():
    config = dataclasses.replace(ModelConfig.tiny_llama(), num_layers=2, num_heads=32)
    policy = random_predictor(config)
    layer = kernels(attention_of(2, "host", policy)) - kernels(attention_of(1, "host", policy))
    # The sketch, its statistics, the predictor's inputs, three hidden layers, and the conclusion.
    assert layer["pallas_call"] == 9 + 7
    # Of those that keep the sketch and of the statistics; nothing before submit waits for them but
    # for what is the same in all layers.
    kept = {"reduce_max": 5, "reduce_or": 2, "reduce_sum": 3, "gather": 3, "scatter": 1}
    assert other_kernels(layer) == {**kept, "concatenate": 6}


@pytest.mark.parametrize("summaries", ["host", "device"])
def test_the_host_begins_before_the_device_reads_its_memory(summaries):
    """Else XLA may run the device's share, or its scores, first, and the two do not overlap."""
    jaxpr = attention_of(1, summaries)
    while len(jaxpr.eqns) == 1:
        jaxpr = jaxpr.eqns[0].params["jaxpr"].jaxpr
    pinned, begun, readers = set(), set(), []
    for eqn in jaxpr.eqns:
        arrays = [v for v in eqn.invars if not hasattr(v, "val")]
        late = any(v in begun for v in arrays)
        reads = any(v in pinned for v in arrays)
        if eqn.params.get("target_name") == "fluxion_submit" or late:
            begun.update(eqn.outvars)
        if eqn.primitive.name in ("fluxion_retag", "reshape") and (
            reads or any(v.aval.memory_space == jax.memory.Space.Host for v in arrays)
        ):
            pinned.update(eqn.outvars)
        elif reads and kernels_within(eqn):
            readers.append((kernels_within(eqn), late))
    assert readers
    assert all(late for _, late in readers), readers


def test_layers_with_the_same_plan_are_planned_once():
    """What a layer selects by and how it is cut is no matter of what the layer before brought."""
    jaxpr = attention_of(2, "device")
    while len(jaxpr.eqns) == 1:
        jaxpr = jaxpr.eqns[0].params["jaxpr"].jaxpr
    from_host = set()
    by_kernel = collections.defaultdict(list)
    for eqn in jaxpr.eqns:
        late = [v in from_host for v in eqn.invars if not hasattr(v, "val")]
        for name in kernels_within(eqn):
            by_kernel[name].append(late)
        if any(late) or eqn.primitive.name == "ffi_call":
            from_host.update(eqn.outvars)
    first, second = by_kernel["select_units"]
    assert not any(first)
    # The scores alone, which follow from the query.
    assert second == [True] + [False] * (len(second) - 1)
    first, second = by_kernel["window_step"]
    assert any(second)


def kernels_within(eqn):
    """Names of the Pallas kernels that an operation is, or has inside."""
    if eqn.primitive.name == "pallas_call":
        return [eqn.params["name"]]
    bodies = (eqn.params[key] for key in ("jaxpr", "call_jaxpr") if key in eqn.params)
    return [
        n for body in bodies for e in getattr(body, "jaxpr", body).eqns for n in kernels_within(e)
    ]
