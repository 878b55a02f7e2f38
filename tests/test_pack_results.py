"""Results come back from a machine in pieces, and go there again."""

import importlib.util
import random
from pathlib import Path

import pytest

_TOOL = Path(__file__).parents[1] / "tools" / "pack_results.py"


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("pack_results", _TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pieces_hold_everything_but_what_can_be_done_without(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "PIECE_BYTES", 1000)
    source, back = tmp_path / "results", tmp_path / "back"
    (source / "evaluate" / "cells").mkdir(parents=True)
    noise = random.Random(0).randbytes(11_500)
    (source / "evaluate" / "cells" / "a.json").write_bytes(noise)
    (source / "evaluate" / "cells" / ".b.json.0a1b2c3d.partial").write_text("half a cell")
    (source / "train.txt").write_text("step 1")
    (source / "weights_0.f32").write_bytes(noise)
    pieces = tool.pack(source, "all")
    assert 11 <= len(pieces) <= 14
    assert sorted(source.iterdir()) == sorted(pieces)
    assert max(piece.stat().st_size for piece in pieces) == 1000
    tool.unpack(back, pieces[::-1])
    found = {p.relative_to(back).as_posix(): p.read_bytes() for p in back.rglob("*") if p.is_file()}
    assert found == {"evaluate/cells/a.json": noise, "train.txt": b"step 1"}
