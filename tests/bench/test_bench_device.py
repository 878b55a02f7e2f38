"""The device benchmark at a tiny size, with the one kernel that runs everywhere."""

from __future__ import annotations

import json

import pytest

from fluxion_jax.bench.device import Settings, render, run


def test_a_tiny_run_has_every_figure(tmp_path):
    settings = Settings(("xla",), ("device",), (16, 64), 2**21, 2**18, calls=2, repetitions=2)
    report = run(settings, tmp_path)
    json.dumps(report, allow_nan=False)
    assert [r["granularity"] for r in report["rows"]] == [16, 64]
    for row in report["rows"]:
        assert row["bytes_read"] == settings.read_bytes
        rate = row["bytes_read"] / row["whole_us"]["median"] / 1e3
        assert row["whole_gb_s"]["median"] == pytest.approx(rate, rel=0.5)
        assert row["ceiling_gb_s"]["median"] > 0
    assert len(render(report).splitlines()) == 2 + len(report["rows"])
    said = []
    assert run(settings, tmp_path, said.append)["rows"] == report["rows"]
    assert said == []
