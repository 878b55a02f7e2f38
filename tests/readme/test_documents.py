"""The documents tell the truth: snippets run, links lead somewhere, commands exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")])
IDS = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)


@pytest.mark.model
def test_readme_snippets_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("run_snippets.py"), ROOT / "README.md"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_relative_links_lead_somewhere(path: Path) -> None:
    text = FENCED.sub("", path.read_text())
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    relative = [target for target in targets if "://" not in target]
    missing = [target for target in relative if not (path.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_named_make_targets_exist(path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.M)
    named = re.findall(r"(?:^|`)make ([a-z]+)", path.read_text(), re.M)
    assert set(named) <= set(phony.split())


def test_every_target_says_what_it_does() -> None:
    help_text = subprocess.run(
        ["make", "-s", "-C", ROOT, "help"], capture_output=True, text=True, check=True
    ).stdout
    for target in ("demo", "test", "lint", "bench"):
        assert f"make {target} " in help_text
