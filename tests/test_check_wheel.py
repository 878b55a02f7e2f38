"""The check of a wheel would notice what is wrong with one."""

from __future__ import annotations

import importlib.util
import io
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

_TOOL = Path(__file__).parents[1] / "tools" / "check_wheel.py"
NAME = "fluxion_jax-0.1.0-py3-none-manylinux_2_34_x86_64.whl"


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("check_wheel", _TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "libraries", "versions", "said"),
    [
        (NAME, {"libc.so.6", "libgcc_s.so.1"}, {"GLIBC_2.2.5", "GLIBC_2.34", "GCC_3.0"}, None),
        (NAME, {"libc.so.6"}, {"GLIBC_2.35"}, "it needs glibc 2.35, its tag says 2.34"),
        (NAME.replace("2_34", "2_4"), set(), {"GLIBC_2.14"}, "it needs glibc 2.14"),
        (NAME, {"libstdc++.so.6"}, {"GLIBC_2.34"}, "libstdc++.so.6 is not part of every system"),
        (NAME, set(), {"GLIBC_2.34", "GLIBCXX_3.4.30"}, "GLIBCXX_3.4.30 is of libstdc++"),
        (NAME.replace("manylinux_2_34", "linux"), set(), {"GLIBC_2.34"}, "expected a tag"),
    ],
)
def test_a_tag_that_promises_too_much(
    tool: Any, name: str, libraries: set[str], versions: set[str], said: str | None
) -> None:
    found = tool.tag_problems(name, libraries, versions)
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


def test_metadata_that_lacks_something(tool: Any) -> None:
    good = "\n".join(
        [
            "License-Expression: Apache-2.0",
            "Requires-Python: >=3.11",
            "Classifier: Typing :: Typed",
            *(f"Provides-Extra: {extra}" for extra in tool.extras()),
        ]
    )
    assert tool.metadata_problems(good) == []
    for line in good.splitlines():
        assert len(tool.metadata_problems(good.replace(line, "X: y"))) == 1, line


def test_files_that_are_missing_or_do_not_belong(tool: Any, tmp_path: Path) -> None:
    wheel = tmp_path / NAME.replace("manylinux_2_34_x86_64", "any")
    info = "fluxion_jax-0.1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (f"{info}/WHEEL", f"{info}/METADATA", "tests/x.py", "host_ops/csrc/a.cc"):
            archive.writestr(name, "")
    found = "\n".join(tool.wheel_problems(wheel, native=False))
    for said in (
        "host_ops/py.typed is missing",
        "tests does not belong",
        "host_ops/csrc/a.cc is a source",
        "the license is missing",
    ):
        assert said in found
    sdist = tmp_path / "fluxion_jax-0.1.0.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("fluxion_jax-0.1.0/host_ops/_native/a.so"), io.BytesIO())
    found = "\n".join(tool.sdist_problems(sdist))
    assert "LICENSE is missing" in found
    assert "host_ops/_native/a.so is not a source" in found
