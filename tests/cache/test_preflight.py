"""A cache that cannot fit is refused before anything of it is allocated."""

from __future__ import annotations

import jax
import pytest

import fluxion_jax as fx
from fluxion_jax import env
from fluxion_jax.cache import preflight

LAYOUT = fx.KVLayout(2, 2, 64, "bfloat16")


@pytest.mark.parametrize("summaries", ["host", "device"])
@pytest.mark.parametrize("max_tokens", [100, 1200, 3000])
def test_bytes_are_known_before_the_cache_exists(summaries, max_tokens):
    layout = fx.KVLayout(3, 2, 64, "float32", summaries=summaries)
    cache = fx.HostKV.allocate(layout, 2, max_tokens)
    assert preflight.host_bytes(layout, 2, max_tokens) == cache.host_bytes


def test_free_memory_is_checked(monkeypatch):
    wanted = preflight.host_bytes(LAYOUT, 1, 2**20)
    headroom = preflight._HEADROOM_BYTES
    monkeypatch.setattr(preflight, "free_bytes", lambda: wanted // 2 + headroom)
    with pytest.raises(fx.ConfigError, match="lower max_tokens to about 524288, use fewer rows"):
        fx.HostKV.allocate(LAYOUT, 1, 2**20)
    monkeypatch.setattr(preflight, "free_bytes", lambda: wanted + headroom)
    preflight.require_memory(LAYOUT, 1, 2**20)
    monkeypatch.setattr(preflight, "free_bytes", lambda: None)
    preflight.require_memory(LAYOUT, 1, 2**20)


def test_a_cache_without_a_host_part_is_never_refused(monkeypatch):
    monkeypatch.setattr(preflight, "free_bytes", lambda: 0)
    assert fx.HostKV.allocate(LAYOUT, 1, 300).host_bytes == 0
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(preflight, "pinned_limit_bytes", lambda: 0)
    monkeypatch.setattr(preflight, "_pinned_in_use", lambda: 1)
    preflight.require_memory(LAYOUT, 1, 300)


def test_the_pinned_pool_is_checked_on_a_gpu(monkeypatch):
    tokens = 64 * 2**20
    wanted = preflight.host_bytes(LAYOUT, 1, tokens)
    assert wanted > 64 * 2**30
    monkeypatch.setattr(preflight, "free_bytes", lambda: None)
    monkeypatch.delenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", raising=False)
    preflight.require_memory(LAYOUT, 1, tokens)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(preflight, "_pinned_in_use", lambda: 2**30)
    enough = -(-(wanted + 2**30) // 2**30) + 2
    with pytest.raises(
        fx.ConfigError, match=f"at most 63.0 GiB .*XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB={enough}"
    ):
        fx.HostKV.allocate(LAYOUT, 1, tokens)
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", str(enough))
    preflight.require_memory(LAYOUT, 1, tokens)


def test_what_the_pinned_pool_keeps_is_there_for_the_next_cache(monkeypatch):
    wanted = preflight.host_bytes(LAYOUT, 1, 2**16)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(preflight, "_most_pinned_bytes", 0)
    # The system has little left, but what has been taken from it before is not lost.
    monkeypatch.setattr(preflight, "free_bytes", lambda: wanted // 4 + preflight._HEADROOM_BYTES)
    in_use = [2 * wanted]
    monkeypatch.setattr(preflight, "_pinned_in_use", lambda: in_use[0])
    preflight.note_pinned()
    in_use[0] = wanted
    preflight.require_memory(LAYOUT, 1, 2**16)
    in_use[0] = 2 * wanted - wanted // 4
    preflight.note_pinned()
    with pytest.raises(fx.ConfigError, match="lower max_tokens to about 32768"):
        preflight.require_memory(LAYOUT, 1, 2**16)


def test_a_cache_tells_how_large_the_pinned_pool_is(monkeypatch):
    monkeypatch.setattr(preflight, "_most_pinned_bytes", 0)
    fx.HostKV.allocate(LAYOUT, 1, 2000)
    assert preflight._most_pinned_bytes == 0
    monkeypatch.setattr(preflight.jax, "default_backend", lambda: "gpu")
    kept = fx.HostKV.allocate(LAYOUT, 1, 2000)
    assert preflight._most_pinned_bytes == preflight._pinned_in_use() >= kept.host_bytes


def test_pinned_arrays_in_use_are_counted():
    before = preflight._pinned_in_use()
    cache = fx.HostKV.allocate(LAYOUT, 1, 2000)
    assert preflight._pinned_in_use() - before == cache.host_bytes


def test_free_memory_is_the_least_of_system_and_control_group(monkeypatch, tmp_path):
    monkeypatch.setattr(env, "_CONTROL_GROUP", tmp_path)
    alone = env.free_bytes()
    assert alone is not None
    assert alone > 0
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("4096\n")
    assert env._memory()["limit_bytes"] is None
    (tmp_path / "memory.max").write_text("1048576\n")
    assert env.free_bytes() == 1048576 - 4096
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 1000\n")
    assert env.free_bytes() == 1048576 - 4096 + 1000
    assert env._memory()["limit_bytes"] == 1048576


def test_bytes_of_each_place_are_shown():
    text = str(fx.HostKV.allocate(fx.KVLayout(2, 2, 64, summaries="device"), 1, 2000))
    assert "keys and values" in text.splitlines()[2]
    assert "summaries" not in text.splitlines()[2]
    assert "summaries" in text.splitlines()[3]
    assert "window" in text.splitlines()[3]
