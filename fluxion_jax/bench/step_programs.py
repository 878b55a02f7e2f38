"""The programs that `fluxion bench step` times: real decode steps, and what they are compared with.

Axes: B batch, N query heads, K KV heads, G = N // K, S tokens, H head size.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import pallas_kernels
from fluxion_jax.attention import Execution
from fluxion_jax.bench.random_arrays import random_array
from fluxion_jax.bench.statistics import summarise
from fluxion_jax.cache.host_kv import HostKV
from fluxion_jax.cache.layout import BLOCK_TOKENS, KVLayout, num_units
from fluxion_jax.cache.preflight import require_memory
from fluxion_jax.decode import LayerTotals, decode_chunk
from fluxion_jax.models.config import ModelConfig
from fluxion_jax.models.decoder import Decoder
from fluxion_jax.policy import Policy, Split, parse_policy, split_at
from fluxion_jax.rope import Rope
from fluxion_jax.sampling import greedy

# Steps of one timed call, as many as `generate` runs in one: starting a program takes as long as a
# step of a small model.
CHUNK_STEPS = 32
_START_CALLS = 5
_SELECTIONS = 50

LLAMA_8B = ModelConfig(
    "llama", 128256, 4096, 32, 32, 8, 128, 14336, 131072,
    norm_eps=1e-5, rope=Rope(theta=500000.0), tied_embeddings=False,
)  # fmt: skip
QWEN_7B = ModelConfig(
    "qwen2", 152064, 3584, 28, 28, 4, 128, 18944, 131072,
    rope=Rope(theta=1000000.0), tied_embeddings=False, qkv_bias=True,
)  # fmt: skip


class Weights(NamedTuple):
    """A model in two parts, as programs take it."""

    graph: Any
    params: Any
    config: ModelConfig


def random_weights(config: ModelConfig, dtype: Any = jnp.bfloat16) -> Weights:
    """Weights of a model's shape, every layer its own, made where they stay."""
    abstract = nnx.eval_shape(lambda: Decoder.random(config, dtype=dtype))
    graph, shapes = nnx.split(abstract)
    leaves, tree = jax.tree.flatten(shapes)
    made = [
        # Norm scales are vectors; weights are small enough for 32 layers of residual sums.
        jnp.ones(x.shape, x.dtype)
        if len(x.shape) == 1
        else _scaled(random_array(x.shape, x.dtype, "device", seed), x.shape[0] ** -0.5)
        for seed, x in enumerate(leaves)
    ]
    return Weights(graph, jax.tree.unflatten(tree, made), config)


@functools.partial(jax.jit, donate_argnums=0)
def _scaled(x: jax.Array, factor: float) -> jax.Array:
    return (x * factor).astype(x.dtype)


def random_cache(
    config: ModelConfig,
    context_tokens: tuple[int, ...],
    summaries: Any,
    keep: HostKV | None = None,
    *,
    sketch: bool = False,
) -> HostKV:
    """A bfloat16 cache of random keys and values, each row as long as it says.

    Selections from it are as spread out as they can be: no block is better than its neighbours.

    Args:
      config: the model's sizes.
      context_tokens: of each row; there is room for a chunk more.
      summaries: where they live.
      keep: a cache of the same sizes whose keys and values are taken over; do not use it again.
      sketch: whether it has one, of random values.
    """
    layout = KVLayout(
        config.num_layers,
        config.num_kv_heads,
        config.head_dim,
        summaries=summaries,
        num_heads=config.num_heads,
        sketch=sketch,
    )
    seeds = iter(range(10**6))
    kept = iter((*keep.k, *keep.v) if keep else ())

    def make(shape: tuple[int, ...], dtype: Any, kind: str) -> jax.Array:
        old = next(kept, None)
        return random_array(shape, dtype, kind, next(seeds)) if old is None else old

    most = max(context_tokens) + CHUNK_STEPS
    if keep is None:
        require_memory(layout, len(context_tokens), most)
    cache = HostKV.allocate_with(make, layout, len(context_tokens), most)
    # A scale of up to 7.9, which the keys of the decoded tokens keep to as well: a context has met
    # its largest keys long before, and to requantise the summaries is no part of a usual step.
    return cache.replace(
        sketch=tuple(
            one._replace(runs=random_array(one.runs.shape, one.runs.dtype, "device", seed))
            for seed, one in enumerate(cache.sketch)
        ),
        lengths=jnp.asarray(context_tokens, jnp.int32),
        exponents=tuple(jnp.full_like(x, -4) for x in cache.exponents),
    )


class Timed(NamedTuple):
    """Seconds of a step in each timed call, and the counts of all of them.

    Attributes:
      step_s: a call's seconds over its steps.
      start_s: what a call takes besides its steps: the time of one of a single step, less a step.
      steps: of all calls.
      totals: of all calls.
    """

    step_s: list[float]
    start_s: float
    steps: int
    totals: LayerTotals


class Stepper:
    """Decode steps of one model over one cache; each call starts from the same context."""

    def __init__(self, weights: Weights, cache: HostKV, execution: Execution | None = None) -> None:
        self.weights, self.cache = weights, cache
        self.execution = execution or Execution(dense_below_tokens=0)
        self.lengths = np.asarray(cache.lengths)
        batch = cache.batch
        self.inputs = (
            jnp.zeros((batch,), jnp.int32),
            jnp.zeros((batch,), bool),
            jnp.full((batch, CHUNK_STEPS), -1, jnp.int32),
        )
        self.rest = (
            jnp.full((1,), -1, jnp.int32),
            jax.random.key(0),
        )

    def trace(self, policy: Policy, split: Split) -> Any:
        """What `jax.jit(...).trace` returns for a call, to compile it elsewhere."""
        arguments = self._arguments(policy, split, CHUNK_STEPS)
        return decode_chunk.trace(*arguments)  # type: ignore[attr-defined]

    def _arguments(self, policy: Policy, split: Split, steps: int) -> tuple[Any, ...]:
        graph, params, _ = self.weights
        inputs = (*self.inputs, jnp.asarray(steps, jnp.int32), *self.rest)
        return graph, params, self.cache, *inputs, policy, split, greedy(), self.execution

    def call(
        self, policy: Policy, split: Split, steps: int = CHUNK_STEPS
    ) -> tuple[float, LayerTotals]:
        """Runs some steps in one call, at most a chunk; returns its seconds and what they read."""
        self.cache = self.cache.replace(lengths=jnp.asarray(self.lengths, jnp.int32))
        arguments = self._arguments(policy, split, steps)
        jax.block_until_ready(self.cache.lengths)
        start = time.perf_counter()
        cache, done = decode_chunk(*arguments)
        jax.block_until_ready(done)
        seconds = time.perf_counter() - start
        self.cache = cache
        cache.check()
        return seconds, jax.tree.map(np.asarray, done.totals)

    def forget(self) -> None:
        """Drops what an adaptive split has learnt, which must not count for what comes next."""
        self.cache = self.cache.replace(pace=jnp.zeros_like(self.cache.pace))

    def timed(self, policy: Policy, split: Split, calls: int) -> Timed:
        """Runs one call to warm up and then times some."""
        self.call(policy, split)
        seconds, totals = zip(*(self.call(policy, split) for _ in range(calls)), strict=True)
        single = [self.call(policy, split, 1)[0] for _ in range(_START_CALLS)]
        step_s = (np.median(seconds) - np.median(single)) / (CHUNK_STEPS - 1)
        summed = jax.tree.map(lambda *xs: np.sum(np.stack(xs), axis=0), *totals)
        return Timed(
            [s / CHUNK_STEPS for s in seconds],
            float(np.median(single) - step_s),
            calls * CHUNK_STEPS,
            summed,
        )


def dense_program() -> Callable[..., jax.Array]:
    """A decode step that attends to everything, without any cache of ours.

    Returns:
      A compiled function of `(graph, params, token, k, v)`, `k` and `v` tuples of `[B, K, S, H]`
      for each layer, in device memory or pinned host memory. From the latter XLA copies a layer
      while it computes with the layer before.
    """

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        batch, heads, head_dim = q.shape
        grouped = q.reshape(batch, k.shape[1], -1, head_dim)
        scores = jnp.einsum("bkgh,bksh->bkgs", grouped, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * head_dim**-0.5, axis=-1).astype(v.dtype)
        out = jnp.einsum("bkgs,bksh->bkgh", weights, v, preferred_element_type=jnp.float32)
        return out.reshape(batch, heads, head_dim).astype(q.dtype)

    def step(graph: Any, params: Any, token: jax.Array, k: Any, v: Any) -> jax.Array:
        model = nnx.merge(graph, params)
        x = model._embed(token[:, None])
        position = jnp.full((token.shape[0], 1), k[0].shape[2], jnp.int32)
        for layer, layer_k, layer_v in zip(model.layers, k, v, strict=True):
            attention = layer.attention
            q, new_k, new_v = attention._project(layer.attention_norm(x), position)
            here = (jax.device_put(y, jax.memory.Space.Device) for y in (layer_k, layer_v))
            out = attend(q[:, 0], *here) + 0 * jnp.mean(new_k + new_v).astype(q.dtype)
            x = layer.finish(x, attention.o(out.reshape(*x.shape[:2], -1)))
        return jnp.argmax(model._logits(x)[:, 0], axis=-1).astype(jnp.int32)

    return jax.jit(step, static_argnums=0)


def time_calls(call: Callable[[], Any], calls: int) -> list[float]:
    """Seconds of each call, after one to compile and warm up."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return seconds


def dense_floor(weights: Weights, batch: int, calls: int) -> dict[str, Any]:
    """Steps of a cache that has no host part: what is neither selected nor read."""
    cache = random_cache(weights.config, (300,) * batch, "device")
    timed = Stepper(weights, cache).timed(parse_policy("full"), split_at(1.0), calls)
    return {"step_s": summarise(timed.step_s), "start_s": timed.start_s}


class Selection(NamedTuple):
    """What is to be selected in layers, one after the other.

    Attributes:
      granularity: int32 `[X, B, K]`, of each of X layers.
      k_units: int32 `[X, B, N]`.
      shared: bool `[X, B, K]`.
      host_blocks: int32 `[B]`.
    """

    granularity: Any
    k_units: Any
    shared: Any
    host_blocks: Any


def fixed_selection(config: ModelConfig, context_tokens: int, batch: int, policy: Any) -> Selection:
    """What a fixed policy selects, the same in every layer."""
    groups, unit = (1, batch, config.num_kv_heads), int(policy.granularity)
    wanted = int(np.ceil(float(policy.budget_fraction) * context_tokens / unit))
    return Selection(
        np.full(groups, unit, np.int32),
        np.full((1, batch, config.num_heads), wanted, np.int32),
        np.full(groups, bool(policy.per_group)),
        np.full((batch,), context_tokens // BLOCK_TOKENS, np.int32),
    )


def selection_s(config: ModelConfig, context_tokens: int, selection: Selection) -> list[float]:
    """Seconds of scoring and selection of one layer with summaries on the device, alone."""
    layers, batch = selection.granularity.shape[:2]
    blocks = -(-context_tokens // BLOCK_TOKENS // 8) * 8
    shape = (batch, config.num_kv_heads, num_units(blocks), 2, config.head_dim)
    summaries = random_array(shape, jnp.int8, "device")
    loops = max(_SELECTIONS, layers)
    q8 = random_array((batch, config.num_heads, config.head_dim), jnp.int8, "device", 7)
    layers_of = jax.tree.map(jnp.asarray, selection)
    seconds = time_calls(lambda: _select_many(q8, summaries, layers_of, loops=loops), 5)
    return [s / loops for s in seconds]


@functools.partial(jax.jit, static_argnames="loops")
def _select_many(
    q8: jax.Array, summaries: jax.Array, selection: Selection, *, loops: int
) -> jax.Array:
    layers = selection.granularity.shape[0]

    def once(i: int, q8: jax.Array) -> jax.Array:
        granularity, k_units, shared = (x[i % layers] for x in selection[:3])
        host_blocks = selection.host_blocks
        ranked = k_units.reshape(*granularity.shape, -1).max(axis=-1) > 0
        scores = pallas_kernels.score_units(q8, summaries, granularity, host_blocks, ranked)
        bits = pallas_kernels.select_units(scores, granularity, host_blocks, k_units, shared)
        # Each needs the one before.
        return q8 ^ (bits[..., :1] & 1).astype(jnp.int8)

    return jax.lax.fori_loop(0, loops, once, q8)
