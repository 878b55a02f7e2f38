"""The implementations that the shared suites run on."""

from __future__ import annotations

import pytest


@pytest.fixture(params=[pytest.param("native", marks=pytest.mark.native), "xla", "numpy"])
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param
