"""The documents tell the truth: snippets run, links lead somewhere, commands exist."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")])
IDS = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
INLINE_CODE = re.compile(r"`[^`\n]*`")
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)


WITH_SNIPPETS = [path for path in DOCUMENTS if "```python" in path.read_text()]


@pytest.mark.model
def test_readme_snippets_run(tmp_path: Path) -> None:
    """Those of all documents; a document may have a hidden setup."""
    assert {path.name for path in WITH_SNIPPETS} >= {"README.md", "tutorial.md", "howto.md"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("run_snippets.py"), *WITH_SNIPPETS],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def anchors(document: Path) -> set[str]:
    """What headings can be linked as, the way GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", document.read_text()), re.M)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


def broken(path: Path, text: str) -> list[str]:
    """Links of a document that lead nowhere, or are no links."""
    found = []
    for target in re.findall(r"\]\(([^)]*)\)", INLINE_CODE.sub("", FENCED.sub("", text))):
        if re.match(r"\w+:", target):
            good = re.fullmatch(r"https://[\w\-]+(\.[\w\-]+)+(/[^\s]*)?", target) is not None
        else:
            name, _, anchor = target.partition("#")
            file = path.parent / name if name else path
            good = file.exists() and (not anchor or (file.is_file() and anchor in anchors(file)))
        if not good:
            found.append(target)
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_links_lead_somewhere(path: Path) -> None:
    assert not broken(path, path.read_text())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_links_of_notebooks_lead_somewhere(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    text = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    assert not broken(path, "\n".join(text))


def test_a_broken_link_is_noticed() -> None:
    text = (
        "[a](none.md) [b](howto.md#nowhere) [c](#no) [d](http://x) [e](https://x y.org) "
        "[f](howto.md#sizing-memory) [g](#how-tos) [h](https://x.org/y) `[i](j)`"
    )
    wrong = ["none.md", "howto.md#nowhere", "#no", "http://x", "https://x y.org"]
    assert broken(ROOT / "docs" / "howto.md", text) == wrong


def test_every_page_is_reached_and_results_are_those_of_the_reports() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages == set(re.findall(r"^([\w-]+)$", index, re.M))
    check = [sys.executable, ROOT / "tools" / "make_results_page.py", "--check"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(check, env=environment, check=False).returncode == 0, (
        "docs/results.md is not what benchmarks/results says: run tools/make_results_page.py"
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_lead_somewhere_and_show_what_they_do(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in t]
    assert not [target for target in targets if not (path.parent / target).exists()]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", ()) for output in outputs)
    # Nothing of the machine that ran it but what the notebook means to tell.
    shown = "".join("".join(output.get("text", ())) for output in outputs)
    assert not re.search(r"/(?:tmp|home|root|work)/", shown)


def test_reports_name_no_folder_of_the_machine_that_made_them() -> None:
    recorded = [*ROOT.glob("benchmarks/results/*.json"), *ROOT.glob("fluxion_jax/**/*.json")]
    assert len(recorded) > 10
    private = re.compile(r"(?<![\w.])/(?:tmp|home|root|work)/")
    assert not [path.name for path in recorded if private.search(path.read_text())]


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
