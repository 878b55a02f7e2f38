"""Every variant of the kernels that this CPU can run does what the reference does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from host_ops import native

pytestmark = pytest.mark.native

# Between them: every head size and type of attention, scoring, ranking by head and by group, ties,
# unions, and the requantising of an append.
NUMERIC = (
    "test_shapes or test_random_cases or test_granularities or test_ranking or test_ties "
    "or test_budgets or test_given_selection or test_requantising"
)


def variants() -> list[str]:
    return [] if native.unavailable_reason() else list(native.info()["variants"])


@pytest.mark.parametrize("variant", variants())
def test_numbers_of_every_variant(variant):
    folder = Path(__file__).parent
    files = [folder / "test_equivalence.py", folder / "test_equivalence_append.py"]
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "-k", f"native and ({NUMERIC})"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        env=os.environ | {"FLUXION_CPU_VARIANT": variant},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    print(f"variant {variant}: {done.stdout.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stdout + done.stderr
