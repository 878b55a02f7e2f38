"""Any history of prefills, decode steps, resets and forks leaves an exact partition of each row."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import fluxion_jax as fx
import host_ops
from fluxion_jax.chunk_attention import prefill_attention
from fluxion_jax.policy import split_at
from tests.cache.model import ModelRow, all_summaries, exponents, host_tokens

BATCH, KV_HEADS, GROUP, HEAD_DIM, LAYERS = 3, 2, 3, 8, 2
SINKS, RECENT, MAX_TOKENS, CHUNK = 16, 32, 400, 40


@functools.lru_cache
def programs(summaries: str, implementation: str) -> tuple:
    execution = fx.Execution(host=implementation, dense_below_tokens=0)

    @fx.jit
    def prefill(cache, q, k, v, count):
        for layer in range(LAYERS):
            _, cache = prefill_attention(
                q, k[layer], v[layer], count, cache, layer, scale=0.3, implementation=implementation
            )
        return cache.advance(count)

    @fx.jit
    def decode(cache, q, k, v, policy, split, fail):
        for layer in range(LAYERS):
            _, cache, _ = fx.decode_attention(
                q,
                k[layer],
                v[layer],
                cache,
                layer,
                policy,
                scale=0.3,
                split=split,
                execution=execution,
            )
        cache = cache.replace(status=cache.status | fail)
        return cache.advance()

    return prefill, decode


class CacheMachine(RuleBasedStateMachine):
    summaries = "host"
    implementation = "xla"

    @initialize(seed=st.integers(0, 2**16))
    def start(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        layout = fx.KVLayout(
            LAYERS, KV_HEADS, HEAD_DIM, "float32", SINKS, RECENT, summaries=self.summaries
        )
        self.cache = fx.HostKV.allocate(layout, BATCH, MAX_TOKENS)
        self.rows = [[ModelRow(KV_HEADS, HEAD_DIM) for _ in range(BATCH)] for _ in range(LAYERS)]

    def draw(self, *shape: int) -> np.ndarray:
        # Magnitudes over many powers of two make the scales grow and the summaries requantise.
        values = (
            self.rng.standard_normal(shape)
            * np.exp2(self.rng.integers(-6, 6, shape[:-1]))[..., None]
        )
        return values.astype(np.float32)

    def longest(self) -> int:
        return max(len(row) for row in self.rows[0])

    @precondition(lambda self: self.longest() + CHUNK <= MAX_TOKENS)
    @rule(counts=st.lists(st.integers(0, CHUNK), min_size=BATCH, max_size=BATCH))
    def prefill(self, counts: list[int]) -> None:
        k, v = (self.draw(LAYERS, BATCH, CHUNK, KV_HEADS, HEAD_DIM) for _ in "kv")
        q = self.draw(BATCH, CHUNK, KV_HEADS * GROUP, HEAD_DIM)
        program, _ = programs(self.summaries, self.implementation)
        self.cache = program(self.cache, q, k, v, jnp.asarray(counts, jnp.int32))
        for layer in range(LAYERS):
            for row, count in enumerate(counts):
                self.rows[layer][row].append(
                    *(np.swapaxes(x[layer, row, :count], 0, 1) for x in (k, v))
                )

    @precondition(lambda self: self.longest() + 40 <= MAX_TOKENS)
    @rule(
        steps=st.integers(1, 40),
        active=st.lists(st.booleans(), min_size=BATCH, max_size=BATCH),
        granularity=st.sampled_from((16, 32, 64, 128)),
        share=st.sampled_from((0.0, 0.5, 1.0)),
        fail_at=st.integers(0, 60),
    )
    def decode(
        self, steps: int, active: list[bool], granularity: int, share: float, fail_at: int
    ) -> None:
        _, program = programs(self.summaries, self.implementation)
        policy, split = fx.fixed(granularity, 0.2), split_at(share)
        before = self.cache.active
        self.cache = self.cache.replace(active=jnp.asarray(active))
        for step in range(steps):
            k, v = (self.draw(LAYERS, BATCH, KV_HEADS, HEAD_DIM) for _ in "kv")
            q = self.draw(BATCH, KV_HEADS * GROUP, HEAD_DIM)
            failed = step == fail_at
            status = jnp.asarray([host_ops.STATUS_INTERNAL if failed else 0], jnp.int32)
            self.cache = program(self.cache, q, k, v, policy, split, status)
            if failed:
                with pytest.raises(fx.FluxionError, match="native operation failed"):
                    self.cache.check()
                self.cache = self.cache.clear_status()
                self.bound_what_would_leave(active)
                continue
            for layer in range(LAYERS):
                for row in range(BATCH):
                    if active[row]:
                        self.rows[layer][row].append(k[layer, row][:, None], v[layer, row][:, None])
        self.cache = self.cache.replace(active=before)

    def bound_what_would_leave(self, active: list[bool]) -> None:
        for layer in self.rows:
            for row, decodes in zip(layer, active, strict=True):
                if decodes:
                    leaves = host_tokens(len(row) + 1, SINKS, RECENT)
                    row.bounded_tokens = max(row.bounded_tokens, leaves)

    @rule(rows=st.sets(st.integers(0, BATCH - 1)))
    def reset(self, rows: set[int]) -> None:
        self.cache = self.cache.reset(sorted(rows))
        for layer in range(LAYERS):
            for row in rows:
                self.rows[layer][row] = ModelRow(KV_HEADS, HEAD_DIM)

    @rule(rows=st.lists(st.integers(0, BATCH - 1), min_size=BATCH, max_size=BATCH))
    def fork(self, rows: list[int]) -> None:
        self.cache = self.cache.fork(rows)
        self.rows = [[layer[row].copy() for row in rows] for layer in self.rows]

    @invariant()
    def partition(self) -> None:
        if not hasattr(self, "cache"):
            return
        lengths = [len(row) for row in self.rows[0]]
        assert np.asarray(self.cache.lengths).tolist() == lengths
        on_host = [host_tokens(n, SINKS, RECENT) for n in lengths]
        assert np.asarray(self.cache.host_len).tolist() == on_host
        for layer in range(LAYERS):
            for row in range(BATCH):
                self.check_row(layer, row, on_host[row])

    def check_row(self, layer: int, row: int, on_host: int) -> None:
        model = self.rows[layer][row]
        for name, want in (("k", model.k), ("v", model.v)):
            host = np.asarray(getattr(self.cache, name)[layer][row])
            window = np.asarray(getattr(self.cache, f"window_{name}")[layer][row])
            flat = host.reshape(KV_HEADS, -1, HEAD_DIM)
            np.testing.assert_array_equal(flat[:, :on_host], want[:, SINKS : SINKS + on_host])
            sinks = min(len(model), SINKS)
            np.testing.assert_array_equal(window[:, :sinks], want[:, :sinks])
            for stream in range(on_host, len(model) - SINKS):
                slot = SINKS + stream % (RECENT + 16)
                np.testing.assert_array_equal(window[:, slot], want[:, SINKS + stream])
        bounded = max(on_host, model.bounded_tokens)
        host_keys = model.k[:, SINKS : SINKS + bounded]
        np.testing.assert_array_equal(self.cache.exponents[layer][row], exponents(host_keys))
        got = np.asarray(self.cache.summaries[layer][row])
        for index, want in all_summaries(host_keys, self.cache.num_host_blocks).items():
            np.testing.assert_array_equal(got[:, index], want, err_msg=f"summary row {index}")


@pytest.mark.parametrize("summaries", ["host", "device"])
@pytest.mark.parametrize(
    "implementation", [pytest.param("native", marks=pytest.mark.native), "xla"]
)
def test_any_history_leaves_an_exact_partition(summaries: str, implementation: str) -> None:
    machine = type(
        "Machine", (CacheMachine,), {"summaries": summaries, "implementation": implementation}
    )
    run_state_machine_as_test(
        machine, settings=settings(max_examples=12, stateful_step_count=12, deadline=None)
    )
