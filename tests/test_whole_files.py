"""Files that two processes write at once: each writer succeeds, and what stays is whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fluxion_jax as fx
from fluxion_jax.bench import cells
from fluxion_jax.calibration import samples


def part(value: int) -> samples._Part:
    return samples._Part(*(np.full(2, value, x) for x in ("f4", "i4", "f4", "i4")))


def plans(value: int) -> fx.policy.ReplayPolicy:
    return fx.policy.ReplayPolicy(
        np.asarray([value], np.int32),
        np.full((1, 1, 1, 1), 16, np.int32),
        np.zeros((1, 1, 1, 1), np.int32),
    )


WRITERS: dict[str, tuple[Callable[[Path, int], None], Callable[[Path], Any]]] = {
    "cell": (
        lambda path, value: cells._keep(path, {"x": value}),
        lambda path: json.loads(path.read_text())["x"],
    ),
    "samples": (
        lambda path, value: samples._keep(path.parent, path.stem, part(value)),
        lambda path: samples._kept(path.parent, path.stem).host_tokens[0],
    ),
    "plans": (
        lambda path, value: plans(value).save(path),
        lambda path: fx.parse_policy(f"replay:{path}").first_position[0],
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_another_writer_of_the_same_file_takes_nothing_away(name, tmp_path, monkeypatch):
    """Another process writes the whole file while this one is about to rename its own."""
    write, read = WRITERS[name]
    path, between = tmp_path / "kept.npz", []
    path = path.with_suffix(".json") if name == "cell" else path
    rename = os.replace

    def meanwhile(source: Any, target: Any) -> None:
        monkeypatch.setattr(os, "replace", rename)
        write(path, 2)
        between.append(read(path))
        rename(source, target)

    monkeypatch.setattr(os, "replace", meanwhile)
    write(path, 1)
    assert between == [2]
    assert read(path) == 1
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
