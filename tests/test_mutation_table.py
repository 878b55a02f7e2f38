"""The mutation table follows the code; tools/mutations.py says whether tests catch them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load_table():
    spec = importlib.util.spec_from_file_location(
        "mutation_table", ROOT / "tools" / "mutation_table.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.MUTATIONS


MUTATIONS = load_table()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_applies(mutation) -> None:
    found = (ROOT / mutation.file).read_text().count(mutation.old)
    assert found == 1, f"expected its old text once in {mutation.file}, found it {found} times"
    assert mutation.new != mutation.old
    for test in mutation.tests:
        path, _, name = test.partition("[")[0].partition("::")
        assert (ROOT / path).is_file()
        assert f"def {name}" in (ROOT / path).read_text()


def test_names_are_unique() -> None:
    names = [mutation.name for mutation in MUTATIONS]
    assert len(set(names)) == len(names)
