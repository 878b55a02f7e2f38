"""The corpus of the shipped model: what is taken, left out, held out, and that it comes again."""

import hashlib
import importlib
import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from fluxion_jax.demo import long_text

_EXAMPLES = str(Path(__file__).parents[2] / "examples")


@pytest.fixture
def corpus():
    if _EXAMPLES not in sys.path:
        sys.path.insert(0, _EXAMPLES)
    return importlib.import_module("recall_model.corpus")


def _text(name):
    return "".join(
        f"The {word} of {name} is told in a sentence of its own, {name}.\n"
        for word in ("source", "river", "garden", "engine", "harbour", "winter", "meadow", "window",
                     "lantern", "orchard", "village", "captain")
    )  # fmt: skip


def _tar(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"package-1.0/{name}")
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))


def _wheel(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)


def _source(corpus, path, **changes):
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    values = {"package": path.name.split(".")[0], "version": "1.0", "licence": "MIT"}
    return corpus.Source(**values, archives={path.name: digest}, **changes)


@pytest.fixture
def made(corpus, tmp_path):
    names = [f"chapter{i}" for i in range(150)]
    own = {f"doc/{name}.rst": _text(name) for name in names}
    _tar(tmp_path / "first.tar.gz", own | {
        "doc/copy.rst": _text("chapter7") + "One more line.\n",
        "secret/left.md": _text("secret"),
        "picture.png": _text("picture"),
        "table.txt": "1234567890 1234567890 1234567890\n" * 40,
        "doc/short.md": "Too short.",
        "doc/prose.txt": long_text()[:4000],
    })  # fmt: skip
    _wheel(
        tmp_path / "second.whl", {"second/a.py": _text("python"), "second/b.py": _text("shared")}
    )
    _tar(tmp_path / "third.tar.gz", {"README.md": _text("shared"), "other.md": _text("third")})
    sources = [
        _source(corpus, tmp_path / "first.tar.gz", exclude=("secret/",)),
        _source(corpus, tmp_path / "second.whl"),
        _source(corpus, tmp_path / "third.tar.gz", held_out=True),
    ]
    manifest = corpus.build(sources, tmp_path, tmp_path / "out", 10**6, 10**6)
    return corpus, sources, tmp_path, manifest


def test_takes_plain_text_once(made):
    corpus, _, folder, manifest = made
    splits, read = corpus.read(folder / "out")
    assert read == json.loads(json.dumps(manifest))
    everything = [*splits.train, *splits.held_out, *splits.held_out_sources]
    assert len(everything) == len(set(everything)) == 150 + 1 + 2
    assert splits.held_out
    assert sorted(splits.held_out_sources) == sorted([_text("shared"), _text("third")])
    # What is in a held-out source is not trained on, wherever else it is.
    assert _text("shared") not in splits.train
    assert _text("python") in splits.train + splits.held_out
    assert sum("of chapter7 is" in text for text in everything) == 1
    assert manifest["splits"]["held_out_sources"] == {
        "files": 2, "bytes": len(_text("shared")) + len(_text("third")),
    }  # fmt: skip


def test_comes_again_byte_for_byte(made):
    corpus, sources, folder, manifest = made
    again = corpus.build(sources[::-1], folder, folder / "again", 10**6, 10**6)
    assert again["files"] == manifest["files"]


def test_keeps_to_the_room_of_a_source(made):
    corpus, sources, folder, _ = made
    manifest = corpus.build(sources, folder, folder / "small", 5000, 0)
    taken = {s["package"]: sum(s["text_bytes"].values()) for s in manifest["sources"]}
    assert taken["second"] == 0
    assert 0 < taken["first"] <= 5000


def test_other_archives_and_pieces_are_refused(made):
    corpus, sources, folder, manifest = made
    (folder / "third.tar.gz").write_bytes(b"other")
    with pytest.raises(ValueError, match="fetch it again"):
        corpus.build(sources, folder, folder / "never", 10**6, 10**6)
    # Fewer pieces are a smaller corpus, with a manifest of its own.
    (folder / "out" / "train_11.xz").unlink()
    splits, read = corpus.read(folder / "out")
    assert 100 < len(splits.train) < manifest["splits"]["train"]["files"]
    assert set(manifest["files"]) - set(read["files"]) == {"train_11.xz"}
    name = next(iter(manifest["files"]))
    (folder / "out" / name).write_bytes(b"other")
    with pytest.raises(ValueError, match="expected SHA-256"):
        corpus.read(folder / "out")


def test_the_shipped_list_is_pinned(corpus):
    sources = corpus.read_sources(Path(_EXAMPLES) / "recall_model" / "corpus_sources.json")
    assert len({(s.package, s.version) for s in sources}) == len(sources) > 100
    assert all(s.version and s.licence and s.archives for s in sources)
    assert all(len(digest) == 64 for s in sources for digest in s.archives.values())
    assert sum(s.held_out for s in sources) >= 5
    # The evaluation's real text comes out of Python's own documentation.
    (python,) = (s for s in sources if s.package == "python3.11")
    assert "Doc/" in python.exclude
