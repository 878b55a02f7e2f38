"""Breaks the code in known ways, one at a time, and expects a test to notice each.

    python tools/mutations.py [NAME ...]

Works on a copy of the tree, with whatever environment this interpreter has; where that environment
links to this tree, the link is cut, so that the copy is what runs. First the tests named
in `tools/mutation_table.py` must pass on the unchanged copy; then each mutation is applied, its
tests run, and it counts as caught only if a test fails. A test run that cannot start fails this
check, and so does an old text that no longer occurs exactly once: the table follows the code.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mutation_table import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 600
PASSED, FAILED = 0, 1  # exit statuses of pytest; every other one means that it could not run

# An editable install may find its packages before sys.path is looked at.
CUT_LINK = """import sys
sys.meta_path[:] = [
    finder for finder in sys.meta_path
    if "fluxion_jax" not in getattr(finder, "known_packages", ())
]
"""
WHERE = """import fluxion_jax, host_ops, pallas_kernels
for package in (fluxion_jax, host_ops, pallas_kernels):
    print(package.__path__[0])
"""


def copy_tree(target: Path) -> None:
    """Copies what git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def environment(tree: Path) -> dict[str, str]:
    """The environment in which `tree` is what gets imported."""
    startup = tree.parent / "startup"
    startup.mkdir(exist_ok=True)
    (startup / "sitecustomize.py").write_text(CUT_LINK)
    return {**os.environ, "PYTHONPATH": f"{startup}{os.pathsep}{tree}"}


def imported_from(tree: Path) -> list[Path]:
    """The folders that hold the packages, as a test in `tree` would import them."""
    printed = subprocess.run(
        [sys.executable, "-c", WHERE],
        cwd=tree.parent,
        env=environment(tree),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [Path(line).parent for line in printed.splitlines()]


def run_tests(tree: Path, tests: tuple[str, ...], log: Path) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    with log.open("w") as output:
        try:
            return subprocess.run(
                command,
                cwd=tree,
                env=environment(tree),
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=TIMEOUT_S,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            output.write(f"\nno result within {TIMEOUT_S} s\n")
            return -1


def rebuild(tree: Path) -> bool:
    command = [sys.executable, tree / "tools" / "build_native.py", "--require", "--root", tree]
    return subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 0


def try_mutation(tree: Path, mutation: Mutation, log: Path) -> str | None:
    """Applies, tests and undoes one mutation; returns what is wrong, or None if it was caught."""
    path = tree / mutation.file
    original = path.read_text()
    count = original.count(mutation.old)
    if count != 1:
        return f"expected its old text once in {mutation.file}, found it {count} times"
    path.write_text(original.replace(mutation.old, mutation.new))
    try:
        # Cheap where no C++ changed since the last time.
        if not rebuild(tree):
            return "the library does not compile, so this tests nothing"
        status = run_tests(tree, mutation.tests, log)
    finally:
        path.write_text(original)
    if status == FAILED:
        return None
    if status == PASSED:
        return f"NOT caught by {' '.join(mutation.tests)}"
    return f"its tests ended with status {status}:\n{log.read_text()[-3000:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="mutations to try (default: all)")
    options = parser.parse_args()
    unknown = set(options.names) - {mutation.name for mutation in MUTATIONS}
    if unknown:
        parser.error(f"no mutation called {', '.join(sorted(unknown))}")
    chosen = [m for m in MUTATIONS if not options.names or m.name in options.names]
    tests = tuple(dict.fromkeys(test for mutation in chosen for test in mutation.tests))
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="mutations-") as directory:
        tree, log = Path(directory) / "tree", Path(directory) / "log"
        copy_tree(tree)
        if not rebuild(tree):
            print("expected the host library to compile on the unchanged tree; nothing was tried")
            return 1
        if set(places := imported_from(tree)) != {tree}:
            print(f"expected the packages to come from {tree}, got {places}; nothing was tried")
            return 1
        status = run_tests(tree, tests, log)
        if status != PASSED:
            print(log.read_text()[-6000:])
            print("expected the tests to pass on the unchanged tree; nothing was tried")
            return 1
        for mutation in chosen:
            start = time.monotonic()
            problem = try_mutation(tree, mutation, log)
            wrong += problem is not None
            took_s = time.monotonic() - start
            print(f"{mutation.name}: {problem or 'caught'} ({took_s:.0f} s)", flush=True)
    print(f"{len(chosen) - wrong} of {len(chosen)} mutations caught")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
