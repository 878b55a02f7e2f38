"""The report of `fluxion info`: complete, plain data, and useful on a broken installation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from fluxion_jax import env

ROOT = Path(__file__).resolve().parent.parent


def test_the_report_says_what_is_in_use() -> None:
    found = env.report()
    assert list(found) == ["versions", "devices", "host_library", "cpu", "memory", "environment"]
    assert not [name for name, section in found.items() if "error" in section]
    assert found["versions"]["jax"] == jax.__version__
    assert found["devices"]["backend"] == jax.default_backend()
    assert "loaded" in found["host_library"]
    assert found["cpu"]["allowed"] >= 1
    assert 0 < found["memory"]["available_bytes"] <= found["memory"]["total_bytes"]


def test_the_report_survives_json() -> None:
    found = env.report()
    assert json.loads(json.dumps(found)).keys() == found.keys()


def test_a_failing_probe_hides_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> env.Section:
        raise OSError("no such probe")

    monkeypatch.setattr(env, "_cpu", fail)
    found = env.report()
    assert found["cpu"] == {"error": "OSError: no such probe"}
    assert "total_bytes" in found["memory"]


def test_environment_variables_are_shown_if_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUXION_NUM_THREADS", "3")
    monkeypatch.delenv("FLUXION_CPU_VARIANT", raising=False)
    found = env.report()["environment"]
    assert found["FLUXION_NUM_THREADS"] == "3"
    assert "FLUXION_CPU_VARIANT" not in found


def test_a_broken_jax_is_reported_in_its_place() -> None:
    # A module entry of None makes every import of it fail.
    code = """
import importlib.util, json, sys
sys.modules["jax"] = None
spec = importlib.util.spec_from_file_location("env", "fluxion_jax/env.py")
env = importlib.util.module_from_spec(spec)
spec.loader.exec_module(env)
print(json.dumps(env.report()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert "jax" in found["devices"]["error"]
    assert found["versions"]["numpy"]
    assert found["memory"]["total_bytes"] > 0


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("total_bytes", 3 * 2**30, "3.0 GiB"),
        ("page_bytes", 4096, "4.0 KiB"),
        ("limit_bytes", None, "-"),
        ("loaded", True, "yes"),
        ("loaded", False, "no"),
        ("variants", ("avx2", "scalar"), "avx2, scalar"),
        ("variants", (), "-"),
        ("allowed", 2, "2"),
    ],
)
def test_values_are_written_for_people(key: str, value: object, text: str) -> None:
    (title, line) = env.render({"some_section": {key: value}}).splitlines()
    assert title == "some section"
    assert line.split("  ")[-1] == text


def test_columns_are_aligned() -> None:
    lines = env.render({"a": {"x": 1, "longer": 2}}).splitlines()
    assert lines == ["a", "  x       1", "  longer  2"]
