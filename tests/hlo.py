"""Looks for copies of whole caches in optimised HLO."""

from __future__ import annotations

import re

# What passes a buffer on, or changes a part of it, without copying the whole.
FREE = {
    "bitcast",
    "call",
    "conditional",
    "custom-call",
    "dynamic-update-slice",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "tuple",
    "while",
}


def full_size_copies(hlo: str, shapes: list[tuple[int, ...]]) -> list[str]:
    """Instructions that are executed and whose result is new and has one of the shapes."""
    computations: dict[str, list[str]] = {}
    for line in hlo.splitlines():
        if line and not line.startswith(" ") and line.endswith("{"):
            name = line.removeprefix("ENTRY ").split(" ")[0].lstrip("%")
            computations[name] = []
        elif computations:
            computations[name].append(line.strip())
    fused = {
        match
        for lines in computations.values()
        for line in lines
        for match in re.findall(r" fusion\(.*calls=%?([\w.\-]+)", line)
    }
    sizes = {",".join(map(str, shape)) for shape in shapes}
    copies = []
    for name, lines in computations.items():
        if name in fused:
            continue
        for line in lines:
            match = re.match(r"(?:ROOT )?%?\S+ = \w+\[([\d,]*)\]\S* ([\w\-]+)\(", line)
            if match is None or match[1] not in sizes or match[2] in FREE:
                continue
            called = re.search(r"calls=%?([\w.\-]+)", line)
            root = next((x for x in computations[called[1]] if "ROOT" in x), "") if called else ""
            if " dynamic-update-slice(" not in root:
                copies.append(line)
    return copies
