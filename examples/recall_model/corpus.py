"""A corpus of real text out of pinned source archives: filtered, without duplicates, split."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import lzma
import os
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from fluxion_jax.demo import long_text
from recall_model.text import END, Corpus

MANIFEST = "manifest.json"
_PROSE = {
    ".rst", ".md", ".txt", ".pod", ".sgml", ".adoc", ".asciidoc", ".texi", ".tex", ".scrbl",
}  # fmt: skip
_CODE = {
    ".py", ".pyx", ".go", ".rs", ".js", ".ts", ".c", ".h", ".cc", ".cpp", ".hpp", ".java", ".rb",
    ".erl", ".ex", ".hs", ".scala", ".kt", ".groovy", ".pl", ".pm", ".lua", ".tcl", ".lisp",
    ".sql", ".agda", ".rkt", ".cmake", ".vim",
}  # fmt: skip
_MIN_BYTES, _MAX_BYTES = 500, 300_000
_HELD_OUT_OF = 50
_SEPARATOR = "\0"
# Tables, data and minified code teach little and compress badly.
_MAX_DIGIT_SHARE, _MAX_LINE, _MIN_LETTER_SHARE = 0.15, 400, 0.5
# A file whose long lines have mostly been seen is a copy of another with small changes.
_LONG_LINE, _MAX_SEEN_SHARE = 30, 0.3
# Files by split. Each has a sample of all sources, so that some of them are a smaller corpus.
_NUM_PIECES = {"train": 12, "held_out": 1, "held_out_sources": 1}


class Source(NamedTuple):
    """A source package: its archives by name with their SHA-256, and what of it is left out."""

    package: str
    version: str
    licence: str
    archives: dict[str, str]
    held_out: bool = False
    exclude: tuple[str, ...] = ()

    @property
    def is_wheel(self) -> bool:
        """Whether it is a wheel of Python's, and not a source package of Debian's."""
        return all(name.endswith(".whl") for name in self.archives)


def read_sources(path: Path) -> list[Source]:
    """Reads the list of pinned sources."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    return [Source(**{**e, "exclude": tuple(e.get("exclude", ()))}) for e in entries]


def _documents(source: Source, folder: Path) -> Iterator[tuple[bytes, str, bool]]:
    """Hash of its place, text, and whether it is prose, of each plain file of a source."""
    for name, wanted in source.archives.items():
        path = folder / name
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != wanted:
            raise ValueError(f"expected SHA-256 {wanted} of {path}, got {found}; fetch it again")
        for inner, raw in _members(path):
            if inner.startswith(source.exclude):
                continue
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError:
                continue
            if _is_plain(raw):
                key = hashlib.sha256(f"{source.package}/{inner}".encode()).digest()
                yield key, text, PurePosixPath(inner).suffix in _PROSE


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file of an archive whose kind and size are those of text."""

    def wanted(name: str, size: int) -> bool:
        return PurePosixPath(name).suffix in _PROSE | _CODE and _MIN_BYTES <= size <= _MAX_BYTES

    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if wanted(entry.filename, entry.file_size):
                    yield entry.filename, archive.read(entry)
        return
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            if file is not None and wanted(member.name, member.size):
                # The first folder has the version in its name.
                yield member.name.partition("/")[2], file.read()


def _is_plain(raw: bytes) -> bool:
    counts = np.bincount(np.frombuffer(raw, np.uint8), minlength=256)
    letters = counts[ord("a") : ord("z") + 1].sum() + counts[ord("A") : ord("Z") + 1].sum()
    return (
        END.encode() not in raw
        and not counts[0]
        and max(map(len, raw.split(b"\n"))) <= _MAX_LINE
        and counts[ord("0") : ord("9") + 1].sum() <= _MAX_DIGIT_SHARE * len(raw)
        and letters >= _MIN_LETTER_SHARE * len(raw)
    )


class _Seen:
    """Long lines that are in the corpus already; the evaluation's real text is from the start."""

    def __init__(self) -> None:
        self._lines: set[int] = set()
        self.is_new(long_text())

    def is_new(self, text: str) -> bool:
        """Whether most of a text's long lines are new; they are not afterwards."""
        stripped = {line.strip() for line in text.split("\n")}
        lines = {
            int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest())
            for line in stripped
            if len(line) >= _LONG_LINE
        }
        if not lines or len(lines & self._lines) > _MAX_SEEN_SHARE * len(lines):
            return False
        self._lines |= lines
        return True


def build(
    sources: Sequence[Source], folder: Path, output: Path, prose_bytes: int, code_bytes: int
) -> dict[str, Any]:
    """Writes the corpus of some sources; the same archives and limits give the same bytes.

    Args:
      sources: sources that are held out come first, so that nothing of them is trained on.
      folder: of their archives.
      output: where `SPLIT_N.xz` and the manifest go.
      prose_bytes: of documentation at most, per source.
      code_bytes: of code at most, per source.

    Returns:
      The manifest.
    """
    seen, splits = _Seen(), {name: [] for name in _NUM_PIECES}
    entries = []
    for source in sorted(sources, key=lambda s: (not s.held_out, s.package)):
        counts = dict.fromkeys(_NUM_PIECES, 0)
        room = {True: prose_bytes, False: code_bytes}
        # Keys of places say the order and the split, so that a cap takes files from everywhere.
        for key, text, prose in sorted(_documents(source, folder)):
            size = len(text.encode())
            if size > room[prose] or not seen.is_new(text):
                continue
            room[prose] -= size
            own = int.from_bytes(key[:8]) % _HELD_OUT_OF == 0
            split = "held_out_sources" if source.held_out else "held_out" if own else "train"
            splits[split].append(text)
            counts[split] += size
        entries.append(source._asdict() | {"text_bytes": counts})
        print(f"{source.package}: {counts}", flush=True)
    output.mkdir(parents=True, exist_ok=True)
    manifest = {"prose_bytes": prose_bytes, "code_bytes": code_bytes, "files": {}}
    for split, texts in splits.items():
        for name, content in _pieces(split, texts):
            (output / name).write_bytes(content)
            manifest["files"][name] = hashlib.sha256(content).hexdigest()
    manifest["splits"] = {
        split: {"files": len(texts), "bytes": sum(len(t.encode()) for t in texts)}
        for split, texts in splits.items()
    }
    manifest["sources"] = entries
    (output / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def _pieces(split: str, texts: Sequence[str]) -> list[tuple[str, bytes]]:
    pieces: list[list[bytes]] = [[] for _ in range(_NUM_PIECES[split])]
    for text in texts:
        raw = text.encode()
        chosen = int.from_bytes(hashlib.sha256(raw).digest()[:8]) % len(pieces)
        pieces[chosen].append(raw)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        packed = pool.map(_pack, pieces)
        return [(f"{split}_{i}.xz", content) for i, content in enumerate(packed)]


def _pack(texts: list[bytes]) -> bytes:
    # The window of this preset holds a piece, and takes half the memory of the next.
    return lzma.compress(_SEPARATOR.encode().join(texts), preset=8 | lzma.PRESET_EXTREME)


def read(folder: Path) -> tuple[Corpus, dict[str, Any]]:
    """Reads what `build` wrote, and the manifest of the pieces that are there.

    Raises:
      ValueError: a piece is another one than the manifest says, or the first of a split is missing.
    """
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    splits: dict[str, list[str]] = {name: [] for name in _NUM_PIECES}
    manifest["files"] = {
        name: wanted
        for name, wanted in manifest["files"].items()
        if (folder / name).exists() or name.endswith("_0.xz")
    }
    for name, wanted in manifest["files"].items():
        path = folder / name
        content = path.read_bytes() if path.exists() else b""
        found = hashlib.sha256(content).hexdigest()
        if found != wanted:
            raise ValueError(f"expected SHA-256 {wanted} of {path}, got {found}; copy it again")
        texts = lzma.decompress(content).decode().split(_SEPARATOR)
        splits[name.rpartition("_")[0]] += [text for text in texts if text]
    return Corpus(**splits), manifest
