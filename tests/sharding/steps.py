"""Decode steps of two layers, a global and a sliding one, on any mesh; and what they come to."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fluxion_jax as fx
from fluxion_jax.chunk_attention import prefill_attention
from fluxion_jax.policy import Plan, one_sided, split_at
from fluxion_jax.sliding import sliding_decode_attention, sliding_prefill_attention

BATCH, KV_HEADS, GROUP, HEAD_DIM, WINDOW = 2, 8, 2, 8, 24
HEADS = KV_HEADS * GROUP
CHUNK, CHUNKS, STEPS, MAX_TOKENS = 60, 3, 20, 256


@jax.tree_util.register_static
class ByHead:
    """Plans differently for every head of the model, so that a device must know which it has."""

    def plan(self, features, lengths):
        batch, heads, _ = features.q.shape
        peak = jnp.abs(features.q).max(axis=(1, 2))[:, None]
        budget = 16 * (jnp.arange(heads) % 5)[None, :] + jnp.where(peak > 2.5, 16, 0)
        granularity = jnp.where(jnp.arange(features.num_kv_heads) % 3 == 0, 32, 16)
        groups = (batch, features.num_kv_heads)
        return Plan(
            jnp.broadcast_to(granularity, groups).astype(jnp.int32),
            jnp.broadcast_to(budget, (batch, heads)).astype(jnp.int32),
            jnp.zeros(groups, bool),
        )


def layout() -> fx.KVLayout:
    return fx.KVLayout(
        2,
        KV_HEADS,
        HEAD_DIM,
        "float32",
        sink_tokens=16,
        recent_tokens=32,
        sliding_window=WINDOW,
        sliding_layers=(1,),
    )


@fx.jit
def _prefill(cache, q, k, v, count):
    out, cache = prefill_attention(q, k, v, count, cache, 0, scale=0.4)
    slid, cache = sliding_prefill_attention(q, k, v, count, cache, 1, WINDOW, scale=0.4)
    return out, slid, cache.advance(count)


def _attend(cache, q, k, v, policy, split):
    out, cache, stats = fx.decode_attention(
        q,
        k,
        v,
        cache,
        0,
        policy,
        scale=0.4,
        split=split,
        execution=fx.Execution(dense_below_tokens=0),
        return_selection=True,
    )
    return out, stats, cache


@fx.jit
def _decode(cache, q, k, v, policy, split):
    out, stats, cache = _attend(cache, q, k, v, policy, split)
    slid, cache = sliding_decode_attention(q, k, v, cache, 1, WINDOW, scale=0.4)
    return out, slid, stats, cache.advance()


@fx.jit
def _decode_global(cache, q, k, v, policy, split):
    out, stats, cache = _attend(cache, q, k, v, policy, split)
    return out, stats, cache.advance()


def run_global(mesh: Any) -> tuple[dict[str, np.ndarray], fx.HostKV]:
    """Decode steps of one layer, behind keys and values from elsewhere: little to compile."""
    rng = np.random.default_rng(1)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    one = fx.KVLayout(1, KV_HEADS, HEAD_DIM, "float32", sink_tokens=16, recent_tokens=32)
    k, v = ([draw(BATCH, 150, KV_HEADS, HEAD_DIM)] for _ in "kv")
    cache = fx.HostKV.from_arrays(one, k, v, [150, 97], MAX_TOKENS, mesh=mesh)
    outs, selections = [], []
    for _ in range(STEPS):
        q = draw(BATCH, HEADS, HEAD_DIM)
        new_k, new_v = (draw(BATCH, KV_HEADS, HEAD_DIM) for _ in "kv")
        out, stats, cache = _decode_global(cache, q, new_k, new_v, ByHead(), one_sided("host"))
        outs.append(np.array(out))
        selections.append(np.array(stats.selection))
    cache.check()
    return {"out": np.stack(outs), "selection": np.stack(selections)}, cache


def run(mesh: Any) -> tuple[dict[str, list[np.ndarray]], fx.HostKV]:
    """Prefills ragged rows in chunks and decodes; every output, and the cache afterwards."""
    rng = np.random.default_rng(0)
    cache = fx.HostKV.allocate(layout(), BATCH, MAX_TOKENS, mesh=mesh)
    seen: dict[str, list[np.ndarray]] = {"prefill": [], "decode": [], "selection": [], "blocks": []}

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    for count in ([60, 60], [60, 31], [60, 0]):
        q = draw(BATCH, CHUNK, HEADS, HEAD_DIM)
        k, v = (draw(BATCH, CHUNK, KV_HEADS, HEAD_DIM) for _ in "kv")
        out, slid, cache = _prefill(cache, q, k, v, np.asarray(count, np.int32))
        for row in range(BATCH):
            seen["prefill"] += [np.array(x[row, : count[row]]) for x in (out, slid)]
    for _ in range(STEPS):
        q = draw(BATCH, HEADS, HEAD_DIM)
        k, v = (draw(BATCH, KV_HEADS, HEAD_DIM) for _ in "kv")
        out, slid, stats, cache = _decode(cache, q, k, v, ByHead(), split_at(0.5))
        seen["decode"] += [np.array(out), np.array(slid)]
        seen["selection"].append(np.array(stats.selection))
        seen["blocks"].append(np.array(stats.host_blocks + stats.device_blocks))
    cache.check()
    return seen, cache


def _zeros() -> tuple[np.ndarray, ...]:
    q = np.zeros((BATCH, HEADS, HEAD_DIM), np.float32)
    return q, q[:, :KV_HEADS], q[:, :KV_HEADS]


def measured(cache: fx.HostKV) -> None:
    """Asks for what a cache on several devices refuses."""
    fx.decode_attention(
        *_zeros(),
        cache.fork(),
        0,
        fx.full(),
        scale=1.0,
        split=split_at(1.0),
        execution=fx.Execution(measure=True),
    )


def copied(cache: fx.HostKV) -> None:
    """A step in a program that does not donate the cache."""

    def step(cache, q, k, v, policy, split):
        _, cache, _ = fx.decode_attention(
            q, k, v, cache, 0, policy, scale=1.0, split=split, execution=fx.Execution()
        )
        return cache.advance()

    program = jax.jit(step, out_shardings=fx.cache_shardings(cache))
    program(cache, *_zeros(), fx.full(), split_at(1.0)).check()


def differences(got: dict[str, list[np.ndarray]], expected: dict[str, list[np.ndarray]]) -> dict:
    """Largest difference of each kind of output."""
    assert {name: len(x) for name, x in got.items()} == {n: len(x) for n, x in expected.items()}
    return {
        name: max(
            float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())
            for a, b in zip(arrays, expected[name], strict=True)
            if a.size
        )
        for name, arrays in got.items()
    }
