"""Executes every notebook from top to bottom, each in an empty directory.

    python tools/run_notebooks.py [--jobs N] [--write] [NOTEBOOK ...]

The notebooks run in this interpreter's environment, two at a time, because one seldom keeps two
cores busy. They share their compiled programs. They are not changed, unless `--write` says to keep
what they print and draw. A cell that raises ends its notebook and fails the run.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
CELL_TIMEOUT_S = 600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", type=Path, nargs="*", help="default: all of notebooks/")
    parser.add_argument("--jobs", type=int, default=2, help="so many at a time")
    parser.add_argument("--write", action="store_true", help="keep the outputs in the notebooks")
    arguments = parser.parse_args()
    notebooks = arguments.notebooks or sorted((ROOT / "notebooks").glob("*.ipynb"))
    if not notebooks:
        print("expected notebooks, found none", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as programs:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", programs)
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
        start = time.monotonic()
        status = asyncio.run(run_all(notebooks, arguments.jobs, arguments.write))
    print(f"{len(notebooks)} notebooks in {time.monotonic() - start:.0f} s")
    return status


async def run_all(notebooks: list[Path], jobs: int, write: bool) -> int:
    free = asyncio.Semaphore(jobs)

    async def one(path: Path) -> bool:
        async with free:
            return await run(path, write)

    return int(not all(await asyncio.gather(*map(one, notebooks))))


async def run(path: Path, write: bool) -> bool:
    notebook = nbformat.read(path, as_version=4)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        client = NotebookClient(
            notebook,
            timeout=CELL_TIMEOUT_S,
            kernel_name="python3",
            record_timing=False,
            # Of a progress bar only the last line is worth keeping.
            coalesce_streams=True,
            resources={"metadata": {"path": directory}},
        )
        try:
            await client.async_execute()
        except CellExecutionError as error:
            print(f"{path.name}: {error}", file=sys.stderr)
            return False
    if write:
        # What the kernel tells of itself differs from machine to machine.
        notebook.metadata["language_info"] = {"name": "python"}
        path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    print(f"{path.name}: {cells} cells in {time.monotonic() - start:.0f} s", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
