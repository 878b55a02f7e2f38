"""Who may import whom, and what an import may do.

fluxion_jax -> {pallas_kernels, host_ops} -> {jax, numpy}: the two leaves take and return plain
arrays, so each can be used, tested and replaced alone.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("fluxion_jax", "host_ops", "pallas_kernels")
LEAF_IMPORTS = {"jax", "jaxlib", "numpy"}
PRODUCT_IMPORTS = LEAF_IMPORTS | {
    "flax",
    "host_ops",
    "ml_dtypes",
    "optax",
    "orbax",
    "pallas_kernels",
    "safetensors",
    "tqdm",
}
# Installed by extras, hence imported where they are used and nowhere else.
LAZY_IMPORTS = {"gguf", "matplotlib", "rouge_score", "tokenizers"}
VAGUE_NAMES = {"common", "helper", "helpers", "misc", "util", "utils"}

SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
IDS = [str(path.relative_to(ROOT)) for path in SOURCES]


def imported(tree: ast.AST) -> Iterator[str]:
    """Top-level names of what a module imports absolutely, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def allowed(package: str) -> set[str]:
    third_party = PRODUCT_IMPORTS if package == "fluxion_jax" else LEAF_IMPORTS
    return third_party | {package} | set(sys.stdlib_module_names)


def outside_functions(tree: ast.Module) -> ast.Module:
    """The statements that run at import: function bodies and TYPE_CHECKING blocks removed."""

    class Remover(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        visit_AsyncFunctionDef = visit_FunctionDef

        def visit_If(self, node: ast.If) -> ast.AST | None:
            if "TYPE_CHECKING" in ast.unparse(node.test):
                return None
            return self.generic_visit(node)

    return Remover().visit(tree)


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_imports_stay_within_the_contract(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    tree = ast.parse(path.read_text())
    lazy = LAZY_IMPORTS if package == "fluxion_jax" else set()
    forbidden = set(imported(tree)) - allowed(package) - lazy
    assert not forbidden, f"{package} may not import {sorted(forbidden)}"
    early = set(imported(outside_functions(tree))) & LAZY_IMPORTS
    assert not early, f"{sorted(early)} come with extras: import them where they are used"


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_imports_name_what_they_take(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names), (
                f"star import, line {node.lineno}"
            )


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_modules_are_named_after_their_idea(path: Path) -> None:
    names = [part.removesuffix(".py") for part in path.relative_to(ROOT).parts]
    assert not VAGUE_NAMES.intersection(names)


def test_the_check_would_notice() -> None:
    tree = ast.parse(
        "from fluxion_jax.cache import x\ndef f():\n    import gguf\n    import torch\n"
    )
    assert set(imported(tree)) - allowed("host_ops") == {"fluxion_jax", "gguf", "torch"}
    assert set(imported(outside_functions(tree))) == {"fluxion_jax"}


IMPORT_EVERYTHING = """
import json, os, pkgutil, sys, importlib
import flax.nnx, jax, numpy, optax, orbax.checkpoint, safetensors, tqdm
from jax._src import xla_bridge

def threads():
    return len(os.listdir("/proc/self/task"))

before = threads()
for package in sys.argv[1:]:
    found = importlib.import_module(package)
    for module in pkgutil.walk_packages(found.__path__, package + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
with open("/proc/self/maps") as maps:
    loaded = "libfluxion" in maps.read()
print(json.dumps({
    "threads": threads() - before,
    "library": loaded,
    "backends": xla_bridge.backends_are_initialized(),
    "lazy": sorted({"gguf", "matplotlib", "rouge_score", "tokenizers"} & sys.modules.keys()),
}))
"""


def test_an_import_does_no_work() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_EVERYTHING, *PACKAGES],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"threads": 0, "library": False, "backends": False, "lazy": []}


# Places of one machine, and hosts of package registries, mean nothing to a reader. Written so that
# this file does not match itself.
FOREIGN = re.compile(
    r"/[w]ork/|/[r]oot/|/[h]ome/\w|[p]ypi\.org|[p]ythonhosted\.org|[n]pmjs\.|[d]ebian\.org"
    r"|\b[w]orkplace\b|\b[s]ubagent|\b[c]laude\b|\b[a]nthropic\b",
    re.IGNORECASE,
)
TEXT = {".cc", ".cff", ".cfg", ".h", ".ipynb", ".json", ".md", ".py", ".sh", ".toml", ".txt", ""}


def tracked_texts() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.suffix in TEXT and path.is_file()]


def test_the_text_stands_on_its_own() -> None:
    found = []
    for path in tracked_texts():
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if FOREIGN.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not found, "\n".join(found)
