"""The sketch: what it holds of the host, and that it depends on the sequence alone."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import fluxion_jax as fx
from fluxion_jax.cache import sketch as sketches
from fluxion_jax.cache.layout import host_tokens
from fluxion_jax.cache.sketch import PROBES, num_runs, run_blocks, sampled_token
from fluxion_jax.chunk_attention import prefill_attention

KV_HEADS, HEADS, HEAD_DIM, CAPACITY = 2, 4, 32, 832
SCALE = 0.4
LENGTHS = (700, 345, 40)
LAYOUT = fx.KVLayout(1, KV_HEADS, HEAD_DIM, "float32", num_heads=HEADS, sketch=True)


@fx.jit
def read_chunk(cache, q, k, v, count):
    _, cache = prefill_attention(q, k, v, count, cache, 0, scale=SCALE, implementation="xla")
    return cache.advance(count)


def draw(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries `[B, S, N, H]`, keys and values `[B, S, K, H]`."""
    rng = np.random.default_rng(seed)
    batch, longest = len(LENGTHS), max(LENGTHS)
    q = rng.standard_normal((batch, longest, HEADS, HEAD_DIM))
    k, v = rng.standard_normal((2, batch, longest, KV_HEADS, HEAD_DIM))
    return q.astype(np.float32), k.astype(np.float32), v.astype(np.float32)


def read(chunk_tokens: int) -> fx.HostKV:
    cache = fx.HostKV.allocate(LAYOUT, len(LENGTHS), CAPACITY)
    arrays = [np.pad(x, ((0, 0), (0, chunk_tokens), (0, 0), (0, 0))) for x in draw()]
    for first in range(0, max(LENGTHS), chunk_tokens):
        part = [jnp.asarray(x[:, first : first + chunk_tokens]) for x in arrays]
        count = np.clip(np.asarray(LENGTHS) - first, 0, chunk_tokens)
        cache = read_chunk(cache, *part, jnp.asarray(count, jnp.int32))
    return cache


@pytest.fixture(scope="module")
def one_read() -> fx.HostKV:
    return read(256)


@pytest.mark.parametrize("capacity_blocks", [8, 512, 520, 1024, 8192])
def test_runs_cover_any_capacity(capacity_blocks):
    runs, per_run = num_runs(capacity_blocks), run_blocks(capacity_blocks)
    assert runs <= 512
    assert (runs - 1) * per_run < capacity_blocks <= runs * per_run
    drawn = sampled_token(np.arange(runs), per_run)
    assert (drawn // 16 == np.arange(runs) * per_run).all()
    if runs >= 16:
        assert set(drawn % 16) == set(range(16))


def test_the_last_queries_of_a_prompt_are_measured(one_read):
    q, k, v = draw()
    sketch = one_read.sketch[0]
    for row, length in enumerate(LENGTHS):
        held = host_tokens(LAYOUT, length)
        measured = []
        for t in range(length - 4, length):
            outs, own = [], []
            for n in range(HEADS):
                keys, values = k[row, : t + 1, n // 2], v[row, : t + 1, n // 2]
                weights = np.exp(SCALE * keys @ q[row, t, n].astype(float))
                weights /= weights.sum()
                host = np.zeros(t + 1, bool)
                host[64 : 64 + held] = True
                full = weights @ values
                mass = weights[host].sum()
                window = weights[~host] @ values[~host] / (1 - mass)
                blocks = weights[host].reshape(-1, 16).sum(1) / max(mass, 1e-30)
                padded = np.pad(blocks, (0, -len(blocks) % 8)).reshape(-1, 8).sum(1)
                outs.append(full)
                own.append((np.linalg.norm(window - full) * (held > 0), mass, blocks, padded))
            largest = max(np.linalg.norm(o) for o in outs)

            def entropy(p: np.ndarray) -> float:
                return float(-(p * np.log2(np.maximum(p, 1e-30))).sum())

            measured.append(
                [
                    [
                        np.log2(error / largest + 1e-6),
                        np.log2(error / largest + 1e-6),
                        mass,
                        entropy(blocks),
                        entropy(coarse),
                        -np.log2(max((blocks**2).sum(), 1e-6)),
                        np.log2(1 + (blocks * mass > 0.01).sum()),
                        np.log2(1 + (blocks * mass > 0.001).sum()),
                        np.linalg.norm(out) / largest,
                    ]
                    for out, (error, mass, blocks, coarse) in zip(outs, own, strict=True)
                ]
            )
        measured = np.asarray(measured)
        expected = measured.mean(axis=0)
        expected[:, 1] = measured[:, :, 1].max(axis=0)
        assert expected.shape == (HEADS, len(PROBES))
        np.testing.assert_allclose(sketch.probes[row], expected, rtol=2e-3, atol=2e-3)
        unit = q[row, length - 4 : length]
        unit = (unit / np.linalg.norm(unit, axis=-1, keepdims=True)).mean(axis=0)
        np.testing.assert_allclose(sketch.probe_q[row], unit, rtol=1e-4, atol=1e-5)
    assert sketch.probe_position.tolist() == [n - 1 for n in LENGTHS]


def test_a_prompts_last_query_is_the_one_before_the_first_step(one_read):
    q, k, _ = draw()
    sketch = one_read.sketch[0]
    for row, length in enumerate(LENGTHS):
        slot = (length - 1) % 2
        assert int(sketch.previous_position[row, slot]) == length - 1
        np.testing.assert_array_equal(sketch.previous_q[row, slot], q[row, length - 1])
        held = host_tokens(LAYOUT, length)
        window = np.r_[0 : min(64, length), 64 + held : length].astype(int)
        window = np.unique(window[window < length])
        for n in range(HEADS):
            scores = SCALE * k[row, window, n // 2] @ q[row, length - 1, n].astype(float)
            wanted = np.log(np.exp(scores).sum())
            assert float(sketch.previous_lse[row, slot, n]) == pytest.approx(wanted, abs=1e-3)


def test_chunks_of_any_size_leave_the_same_sketch(one_read):
    other = read(112)
    held = [host_tokens(LAYOUT, n) // 16 for n in LENGTHS]
    for row, blocks in enumerate(held):
        np.testing.assert_array_equal(
            other.sketch[0].runs[row, :, :blocks], one_read.sketch[0].runs[row, :, :blocks]
        )
    np.testing.assert_allclose(
        other.sketch[0].probes, one_read.sketch[0].probes, rtol=1e-3, atol=1e-3
    )


def test_a_run_that_arrives_in_parts_holds_all_its_blocks(monkeypatch):
    monkeypatch.setattr(sketches, "MAX_RUNS", 9)
    # Three blocks a chunk, which are not a whole number of runs.
    cache = read(48)
    runs = np.asarray(cache.sketch[0].runs)
    run_tokens = 16 * run_blocks(cache.num_host_blocks)
    assert run_tokens == 64
    keys, seen = draw()[1], 0
    for row, length in enumerate(LENGTHS):
        stream = keys[row, 64 : 64 + host_tokens(LAYOUT, length)]
        for run, first in enumerate(range(0, len(stream), run_tokens)):
            part = stream[first : first + run_tokens]
            np.testing.assert_array_equal(runs[row, :, run, 2], (-part).max(axis=0))
            np.testing.assert_array_equal(runs[row, :, run, 3], part.max(axis=0))
            seen += 1
    assert seen > 5


def test_forgotten_rows_know_nothing(one_read):
    sketch = one_read.fork().reset([1]).sketch[0]
    assert sketch.probe_position.tolist() == [LENGTHS[0] - 1, -1, LENGTHS[2] - 1]
    assert (np.asarray(sketch.previous_position)[1] == -1).all()
    assert (np.asarray(sketch.previous_position)[0] >= 0).any()
    forked = one_read.fork([2, 0]).sketch[0]
    np.testing.assert_array_equal(forked.runs[1], one_read.sketch[0].runs[0])


def test_a_cache_keeps_no_sketch_where_none_can_be_used():
    plain = fx.KVLayout(1, KV_HEADS, HEAD_DIM, "float32", num_heads=HEADS)
    assert fx.HostKV.allocate(plain, 1, CAPACITY).sketch == ()
    assert fx.HostKV.allocate(LAYOUT, 1, 100).sketch == ()
    with pytest.raises(fx.ConfigError, match="expected num_heads to be a multiple of 2 KV heads"):
        fx.KVLayout(1, KV_HEADS, HEAD_DIM, num_heads=3)
    with pytest.raises(fx.ConfigError, match="expected num_heads for a cache with a sketch"):
        fx.KVLayout(1, KV_HEADS, HEAD_DIM, sketch=True)
