"""Wide instructions stay in the kernels that are chosen for them at run time.

A processor without them dies of one that the compiler put anywhere else, also by way of an inline
function that two files share and of which the linker keeps the wrong copy.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from host_ops import native

# What each file may use: nothing that is encoded with a VEX or EVEX prefix, the former, or both.
LEVELS = {"kernels_avx2.cc": 1, "kernels_avx512.cc": 2, "kernels_avx512_vnni.cc": 3}
FUNCTION = re.compile(r"^([0-9a-f]+) <(.*)>:$")
MASK_MOVES = r"k(?:mov|and|andn|or|xor|xnor|not|add|unpck|shift[lr]|ortest|test)[bwdq]+"


def instruction_level(line: str) -> int:
    """0 for the baseline, 1 for AVX and AVX2, 2 for AVX-512, 3 for its integer dot products."""
    _, _, text = line.partition("\t")
    mnemonic = text.split(" ", 1)[0]
    if mnemonic.startswith(("vpdpbusd", "vpdpwssd")):
        return 3
    if re.search(r"%zmm|%[xy]mm(?:1[6-9]|2\d|3[01])\b|\{%k\d\}|\{z\}", text) or re.fullmatch(
        MASK_MOVES, mnemonic
    ):
        return 2
    bmi = ("andn", "bextr", "bzhi", "mulx", "pdep", "pext", "rorx", "sarx", "shlx", "shrx")
    # verr and verw are as old as the 80286.
    is_vex = mnemonic.startswith("v") and not mnemonic.startswith("ver")
    return 1 if is_vex or mnemonic.rstrip("lq") in bmi or "%ymm" in text else 0


def output(*command: str) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def addresses_by_file(library: Path) -> dict[int, str]:
    """The source file of each function that only its own file sees, and of the exported tables."""
    files: dict[int, str] = {}
    current = ""
    for line in output("readelf", "--wide", "--symbols", str(library)):
        fields = line.split()
        if len(fields) >= 7 and fields[3] == "FILE":
            current = fields[7] if len(fields) > 7 else ""
        elif len(fields) >= 8 and fields[3] == "FUNC" and fields[6] != "UND":
            table = re.fullmatch(r"_ZN7fluxion\d+(avx2|avx512|avx512_vnni)_kernelsEv", fields[7])
            files[int(fields[1], 16)] = f"kernels_{table[1]}.cc" if table else current
    return files


def levels(library: Path) -> dict[tuple[str, str], int]:
    """The highest level that each function uses, by its file and name."""
    files = addresses_by_file(library)
    found: dict[tuple[str, str], int] = {}
    key = ("", "")
    for line in output("objdump", "-d", "--no-show-raw-insn", str(library)):
        if match := FUNCTION.match(line):
            key = (files.get(int(match[1], 16), ""), match[2])
            found.setdefault(key, 0)
        elif "\t" in line:
            found[key] = max(found[key], instruction_level(line))
    return found


@pytest.mark.native
def test_only_the_kernels_of_a_variant_use_its_instructions() -> None:
    if not shutil.which("objdump") or not shutil.which("readelf"):
        pytest.skip("needs objdump and readelf")
    found = levels(Path(native.info()["path"]))
    if not any(file for file, _ in found):
        pytest.skip("the library has been stripped")
    wrong = [
        f"{name} of {file or 'no file'}: {level}"
        for (file, name), level in found.items()
        if level > LEVELS.get(file, 0)
    ]
    assert not wrong, "\n".join(wrong)
    # And that the disassembly was understood: each variant uses what it is for.
    for file, level in LEVELS.items():
        assert max(value for (own, _), value in found.items() if own == file) == level


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("paddd  %xmm1,%xmm0", 0),
        ("verw   0x8(%rax)", 0),
        ("popcnt %rax,%rbx", 0),
        ("vzeroupper", 1),
        ("shlx   %rax,%rbx,%rcx", 1),
        ("vpaddd %ymm1,%ymm0,%ymm0", 1),
        ("vpaddd %ymm17,%ymm0,%ymm0", 2),
        ("vpaddd %zmm1,%zmm0,%zmm0", 2),
        ("vmovdqu8 (%rax),%xmm0{%k1}{z}", 2),
        ("kmovw  %eax,%k1", 2),
        ("vpdpbusd %zmm1,%zmm0,%zmm0", 3),
    ],
)
def test_what_an_instruction_needs(text: str, level: int) -> None:
    assert instruction_level(f"  1234:\t{text}") == level
