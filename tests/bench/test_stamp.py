"""Where a figure comes from."""

from __future__ import annotations

from fluxion_jax.bench.stamp import stamp


def test_a_copied_tree_says_its_commit(monkeypatch):
    monkeypatch.setenv("FLUXION_COMMIT", "0123abc")
    made = stamp()
    assert (made["commit"], made["dirty"]) == ("0123abc", False)
