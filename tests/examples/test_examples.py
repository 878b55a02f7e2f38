"""Every example runs, as a user would run it, and checks itself with assertions."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

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
