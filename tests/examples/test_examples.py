"""Every example runs, as a user would run it, and checks itself with assertions."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

import fluxion_jax as fx
from fluxion_jax.policy import parse_split
from tests.hlo import full_size_copies

EXAMPLES = Path(__file__).parents[2] / "examples"
# These take options and are tested by themselves.
TESTED_ELSEWHERE = {EXAMPLES / "build_corpus.py", EXAMPLES / "train_recall_model.py"}
SCRIPTS = sorted(set(EXAMPLES.glob("*.py")) - TESTED_ELSEWHERE)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_example_runs(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


def test_the_ten_lines_are_ten() -> None:
    """The import, the adapter and the generation, as formatted; a `print` adds nothing."""
    _, _, added = (EXAMPLES / "ten_lines.py").read_text().partition("the ten lines\n")
    lines = [line for line in added.splitlines() if line and not line.startswith("print(")]
    assert len(["import fluxion_jax as fx", *lines]) == 10
    assert lines[0] == "model = fx.adapt("
    assert lines[-1].startswith("result = fx.generate(model, ")


@pytest.mark.parametrize(
    ("name", "weights"),
    [("linen_scan_over_layers", "variables"), ("scan_over_layers", "parameters")],
)
def test_no_step_of_a_scan_over_layers_copies_the_cache(name: str, weights: str) -> None:
    found = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    cache, token = found["cache"], jnp.zeros((1,), jnp.int32)
    traced = found["decode"].trace(
        cache, found[weights], token, fx.fixed(16, 0.1), parse_split("host")
    )
    text = traced.lower().compile().as_text()
    assert full_size_copies(text, [x.shape for x in cache.host_arrays]) == []
