"""Packs a folder of results into a few pieces of limited size, and unpacks them again.

    python tools/pack_results.py pack FOLDER NAME
    python tools/pack_results.py unpack FOLDER PIECE...

The first leaves nothing in the folder but FOLDER/NAME.tar.xz.0, .1 and so on. For moving
results where the number and size of files are limited. What a finished run does not need to go on
is left out: float32 weights and moments of a training run, whose exported model is in.
"""

from __future__ import annotations

import fnmatch
import io
import shutil
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

PIECE_BYTES = 15 << 20
_LEFT_OUT = ("weights_*.f32", "moments.npz", "*.partial")


def pack(folder: Path, name: str) -> list[Path]:
    """Replaces the content of a folder by the pieces of an archive of it."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz", preset=1) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not any(fnmatch.fnmatch(path.name, p) for p in _LEFT_OUT):
                archive.add(path, path.relative_to(folder).as_posix())
    content = packed.getvalue()
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    pieces = []
    for i, begin in enumerate(range(0, len(content), PIECE_BYTES)):
        pieces.append(folder / f"{name}.tar.xz.{i}")
        pieces[-1].write_bytes(content[begin : begin + PIECE_BYTES])
    return pieces


def unpack(folder: Path, pieces: Sequence[Path]) -> None:
    """Unpacks all pieces of an archive, given in any order, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    ordered = sorted(pieces, key=lambda piece: int(piece.suffix[1:]))
    content = b"".join(piece.read_bytes() for piece in ordered)
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:xz") as archive:
        archive.extractall(folder, filter="data")


def main() -> None:
    """Runs the command line."""
    action, folder, *names = sys.argv[1:]
    if action == "pack":
        for piece in pack(Path(folder), names[0]):
            print(f"{piece}: {piece.stat().st_size / 2**20:.1f} MiB")
    else:
        unpack(Path(folder), [Path(name) for name in names])


if __name__ == "__main__":
    main()
