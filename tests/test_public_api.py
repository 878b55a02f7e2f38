"""The public names: few, documented, and all in the reference."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import fluxion_jax

NAMES = {
    "CacheFullError",
    "ConfigError",
    "Execution",
    "FluxionError",
    "HostKV",
    "IntegrityError",
    "KVLayout",
    "LayerStats",
    "Plan",
    "Policy",
    "Result",
    "Sampling",
    "Scores",
    "UnsupportedError",
    "adapt",
    "cache_shardings",
    "calibrate",
    "decode_attention",
    "fixed",
    "full",
    "generate",
    "greedy",
    "jit",
    "parse_policy",
    "parse_split",
    "prefill",
    "score",
    "stream",
    "top_p",
}
REFERENCE = (Path(__file__).parents[1] / "docs" / "api.md").read_text()


def public() -> set[str]:
    found = vars(fluxion_jax).items()
    return {name for name, thing in found if callable(thing) and not name.startswith("_")}


def test_the_public_names_are_these_and_few() -> None:
    assert public() == NAMES
    assert len(NAMES) < 30


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_name_is_documented(name: str) -> None:
    thing = getattr(fluxion_jax, name)
    assert re.search(rf"^\.\. auto\w+:: fluxion_jax\.{name}$", REFERENCE, re.M)
    documented = inspect.getdoc(thing) or ""
    assert len(documented) > 40
    if inspect.isfunction(thing) and inspect.signature(thing).parameters:
        assert "Args:" in documented
        for parameter in inspect.signature(inspect.unwrap(thing)).parameters:
            assert re.search(rf"^\s*\**{parameter}: ", documented, re.M), parameter
