"""A saved cache comes back bit for bit, or with an error; a writer that dies loses nothing."""

from __future__ import annotations

import functools
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import fluxion_jax as fx
from fluxion_jax.cache.layout import BLOCK_TOKENS
from fluxion_jax.models import Decoder, ModelConfig

PROMPTS = [list(range(3, 200)), [7, 8, 9], list(range(90))]


@functools.cache
def model(name: str) -> Decoder:
    config = ModelConfig.tiny_gemma3() if name == "gemma3" else ModelConfig.tiny_llama()
    return Decoder.random(config)


def small_cache(**changes: Any) -> fx.HostKV:
    """Two layers with a host part, filled without a model, 5 KiB of it."""
    options = {"sink_tokens": 16, "recent_tokens": 16, "dtype": "float32"} | changes
    layout = fx.KVLayout(2, 2, 8, **options)
    rng = np.random.default_rng(0)
    k, v = ([rng.normal(size=(2, 70, 2, 8)).astype(np.float32) for _ in range(2)] for _ in "kv")
    return fx.HostKV.from_arrays(layout, k, v, [70, 45], 128)


def live(cache: fx.HostKV) -> dict[str, np.ndarray]:
    """Everything that sequences reach, as bytes."""
    blocks = int(cache.host_len.max()) // BLOCK_TOKENS
    arrays: dict[str, np.ndarray] = {}
    for name in ("exponents", "window_k", "window_v", "sliding_k", "sliding_v"):
        for layer, array in enumerate(getattr(cache, name)):
            arrays[f"{name}{layer}"] = np.array(array)
    for name in ("k", "v"):
        for layer, array in enumerate(getattr(cache, name)):
            arrays[f"{name}{layer}"] = np.array(array)[:, :, :blocks]
    for layer, array in enumerate(cache.summaries):
        first = 0
        for unit_blocks in (1, 2, 4, 8):
            rows = np.array(array)[:, :, first : first - (-blocks // unit_blocks)]
            arrays[f"summaries{layer}, {unit_blocks}"] = rows
            first += cache.num_host_blocks // unit_blocks
    for layer, sketch in enumerate(cache.sketch):
        for name, array in sketch._asdict().items():
            arrays[f"sketch{layer}, {name}"] = np.array(array)
    for name in ("lengths", "active", "status", "pace"):
        arrays[name] = np.array(getattr(cache, name))
    return arrays


def assert_same(got: fx.HostKV, expected: fx.HostKV) -> None:
    assert (got.layout, got.max_tokens) == (expected.layout, expected.max_tokens)
    ours, theirs = live(got), live(expected)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype
        assert array.tobytes() == theirs[name].tobytes(), name
    kinds = jax.tree.map(lambda x: x.sharding.memory_kind, got)
    assert jax.tree.leaves(kinds) == jax.tree.leaves(
        jax.tree.map(lambda x: x.sharding.memory_kind, expected)
    )


@pytest.mark.parametrize(
    ("name", "dtype", "summaries"),
    [("llama", "float32", "host"), ("llama", "bfloat16", "device"), ("gemma3", "float32", "host")],
)
def test_a_conversation_goes_on_as_if_it_had_never_been_saved(
    name: str, dtype: str, summaries: Any, tmp_path: Path
) -> None:
    loaded = model(name)
    layout = loaded.config.kv_layout(dtype, summaries, sketch=dtype == "bfloat16")
    cache = fx.HostKV.allocate(layout, 3, 640)
    options = {"policy": "fixed:16:0.1", "execution": fx.Execution(dense_below_tokens=0)}
    rows = [(row * 2)[:400] for row in PROMPTS]
    fx.prefill(loaded, rows, cache, chunk_tokens=128, progress=False)
    cache.active = cache.active.at[1].set(False)
    cache.save(tmp_path / "cache")
    restored = fx.HostKV.load(tmp_path / "cache")
    assert_same(restored, cache)
    results = [
        fx.generate(loaded, [[1], [2], [3]], cache=c, max_new_tokens=20, progress=False, **options)
        for c in (cache, restored)
    ]
    # Also that neither saving nor loading keeps a program from updating the cache in place.
    for got, expected in zip(results[1].log_probs, results[0].log_probs, strict=True):
        assert got.tobytes() == expected.tobytes()
    assert_same(restored, cache)


def test_only_what_sequences_reach_is_written(tmp_path: Path) -> None:
    cache = fx.HostKV.allocate(fx.KVLayout(2, 2, 64, sink_tokens=0, recent_tokens=16), 2, 100_000)
    cache.save(tmp_path / "empty")
    assert (tmp_path / "empty").stat().st_size < 100_000 < cache.host_bytes
    assert_same(fx.HostKV.load(tmp_path / "empty"), cache)


def test_a_bit_that_flips_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    small_cache().save(path)
    content = bytearray(path.read_bytes())
    rng = np.random.default_rng(1)
    # Anywhere, and many of them where a wrong value could do the most harm.
    places = np.concatenate([rng.integers(0, len(content), 200), np.arange(24), [len(content) - 1]])
    for place in places:
        bit = 1 << int(rng.integers(8))
        content[place] ^= bit
        path.write_bytes(content)
        with pytest.raises(fx.IntegrityError):
            fx.HostKV.load(path)
        content[place] ^= bit
    path.write_bytes(content)
    assert_same(fx.HostKV.load(path), small_cache())


def test_a_truncated_or_longer_file_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    small_cache().save(path)
    content = path.read_bytes()
    for length in (0, 1, 16, 23, 24, 100, 400, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(fx.IntegrityError, match="expected"):
            fx.HostKV.load(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(fx.IntegrityError, match=f"expected {len(content)} bytes"):
        fx.HostKV.load(path)


def test_arrays_that_changed_places_are_detected(tmp_path: Path) -> None:
    """The checksums are of names too: two good sections in the wrong order are not good."""
    path = tmp_path / "cache"
    cache = small_cache()
    cache.save(path)
    content = path.read_bytes()
    ends = content[: len(content) - (2 * 4 + 32) - (2 + 32) - (4 + 32)]
    window = 2 * 2 * 48 * 8 * 4 + 32
    assert cache.window_v[0].nbytes + 32 == window
    swapped = ends[: -2 * window] + ends[-window:] + ends[-2 * window : -window]
    path.write_bytes(swapped + content[len(ends) :])
    with pytest.raises(fx.IntegrityError, match=r"expected window_v\[0\]"):
        fx.HostKV.load(path)


def _save_for_ever(folder: str, ready: Any) -> None:
    caches = [fx.HostKV.load(Path(folder) / name) for name in ("first", "second")]
    while True:
        for cache in caches:
            cache.save(Path(folder) / "kept")
            ready.set()


@pytest.mark.slow
def test_a_writer_that_is_killed_loses_nothing(tmp_path: Path) -> None:
    first, second = small_cache(), small_cache()
    second.lengths = second.lengths - 1
    first.save(tmp_path / "first")
    second.save(tmp_path / "second")
    first.save(tmp_path / "kept")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.cache.test_saving"])
    rng = np.random.default_rng(2)
    for _ in range(20):
        ready = context.Event()
        writer = context.Process(target=_save_for_ever, args=(str(tmp_path), ready))
        writer.start()
        assert ready.wait(60)
        time.sleep(rng.uniform(0, 0.02))
        writer.kill()
        writer.join()
        kept = fx.HostKV.load(tmp_path / "kept")
        assert_same(kept, first if int(kept.lengths[0]) == 70 else second)
    # Or no writer was killed while it wrote.
    assert list(tmp_path.glob(".kept.*.partial"))


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = small_cache()
    cache.save(tmp_path / "cache")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        cache.save(tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert_same(fx.HostKV.load(tmp_path / "cache"), cache)


def test_what_cannot_be_saved_or_loaded(tmp_path: Path) -> None:
    with pytest.raises(fx.ConfigError, match=r"expected a file that HostKV\.save wrote"):
        fx.HostKV.load(tmp_path / "missing")
    with pytest.raises(fx.ConfigError, match="got the directory"):
        small_cache().save(tmp_path)
    (tmp_path / "other").write_bytes(b"something else entirely, and long enough")
    with pytest.raises(fx.IntegrityError, match="something else"):
        fx.HostKV.load(tmp_path / "other")
