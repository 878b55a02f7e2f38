"""Compares the host library of an installed package with float64, on random caches.

It is meant to run outside of the tree, on the wheel that users get, and under an emulator of a
processor without wide instructions:

    FLUXION_CPU_VARIANT=scalar python check_host_numerics.py --expect scalar
    qemu-x86_64-static -cpu Haswell python check_host_numerics.py --expect avx2 --best
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

from host_ops import native

CASES = Path(__file__).resolve().parents[1] / "tests" / "host_ops"
# Sizes that every variant has code of its own for, and one that none has.
SHAPES: tuple[dict[str, Any], ...] = (
    {"head_dim": 40, "dtype": "float32"},
    {"head_dim": 64, "dtype": "bfloat16", "group": 7},
    {"head_dim": 128, "dtype": "float16", "group": 1},
)


def load_cases() -> Any:
    """The tests' inputs and comparison, without the tree's packages on the path."""
    sys.path.insert(0, str(CASES))
    try:
        return importlib.import_module("cases")
    finally:
        sys.path.remove(str(CASES))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--expect", required=True, help="the variant that has to be in use")
    parser.add_argument("--best", action="store_true", help="no better one may be usable")
    options = parser.parse_args()
    about = native.info()
    if about["variant"] != options.expect:
        print(f"expected the variant {options.expect}, got {about['variant']}: {about['reason']}")
        return 1
    if options.best and about["variants"][0] != options.expect:
        print(f"expected no variant better than {options.expect}, got {about['variants']}")
        return 1
    cases = load_cases()
    for shape in SHAPES:
        cases.check("native", cases.random_case(cases.Shape(num_blocks=24, **shape), seed=3))
    print(f"{about['path']}: {options.expect} agrees with float64 in {len(SHAPES)} cases")
    return 0


if __name__ == "__main__":
    sys.exit(main())
