"""Bars are for those who watch: a terminal's move, a notebook's come late, a file gets none."""

from __future__ import annotations

import io
import sys

import pytest
from tqdm import tqdm

from fluxion_jax.progress import bar_options


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# As the kernel's stream: no terminal, and known by the module of its class.
Kernel = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})


def shown(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, progress: bool | None) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in tqdm(range(3), file=stream, **bar_options(progress)):
        pass
    return stream.getvalue()


def test_a_terminal_has_bars_and_a_file_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "3/3" in shown(Terminal(), monkeypatch, None)
    assert not shown(io.StringIO(), monkeypatch, None)


def test_a_notebook_has_bars_of_long_work_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not shown(Kernel(), monkeypatch, None)
    monkeypatch.setattr("fluxion_jax.progress._NOTEBOOK_DELAY_S", 1e-9)
    text = shown(Kernel(), monkeypatch, None)
    assert "3/3" in text
    assert text.isascii()


@pytest.mark.parametrize("stream", [Terminal, Kernel, io.StringIO])
def test_one_may_insist(stream: type[io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "3/3" in shown(stream(), monkeypatch, True)
    assert not shown(stream(), monkeypatch, False)
