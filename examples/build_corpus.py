"""Builds the corpus that the shipped model is trained on, from pinned packages.

    python examples/build_corpus.py --archives build/archives --output build/corpus --fetch

With `--fetch` the archives come through `pip download` and, on Debian 12 or with its sources in a
sources.list, `apt-get source`; those that are there already are kept. Packages, versions, licences
and SHA-256 are in `recall_model/corpus_sources.json`. A version that Debian has replaced since is
in its archive of snapshots.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from recall_model.corpus import Source, build, read_sources

_SOURCES = Path(__file__).parent / "recall_model" / "corpus_sources.json"
# The same wheels wherever it runs.
_PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")


def fetch(source: Source, folder: Path) -> None:
    """Downloads the archives of a source, without unpacking, building or installing anything."""
    if all((folder / name).exists() for name in source.archives):
        return
    if source.is_wheel:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version", "3.12", "--implementation", "cp"]
        for platform in _PLATFORMS:
            command += ["--platform", f"{platform}_x86_64"]
        command.append(f"{source.package}=={source.version}")
    else:
        command = ["apt-get", "source", "--download-only", f"{source.package}={source.version}"]
    subprocess.run(command, cwd=folder, check=True)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Builds the corpus of the shipped model.")
    parser.add_argument("--archives", type=Path, required=True, help="folder of the archives")
    parser.add_argument("--output", type=Path, required=True, help="folder of the corpus")
    parser.add_argument("--fetch", action="store_true", help="download what is missing")
    parser.add_argument("--prose-bytes", type=int, default=4_000_000, help="per source, at most")
    parser.add_argument("--code-bytes", type=int, default=1_500_000, help="per source, at most")
    args = parser.parse_args()
    sources = read_sources(_SOURCES)
    if args.fetch:
        args.archives.mkdir(parents=True, exist_ok=True)
        for source in sources:
            fetch(source, args.archives)
    manifest = build(sources, args.archives, args.output, args.prose_bytes, args.code_bytes)
    size = sum((args.output / name).stat().st_size for name in manifest["files"])
    print(f"{manifest['splits']}, {size / 2**20:.1f} MiB compressed")


if __name__ == "__main__":
    main()
