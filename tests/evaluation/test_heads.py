"""The study of heads on a tiny random model, and its figure."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fluxion_jax import cli
from fluxion_jax.errors import ConfigError
from fluxion_jax.evaluation.heads import Study, heads_figure, study_heads
from fluxion_jax.models import load_model
from tests.cli.conftest import model as model

STUDY = Study(tasks=("passkey", "real_text"), length_tokens=640, samples=1, steps=3)


@pytest.fixture(scope="module")
def report(model: Path):
    return study_heads(load_model(model), STUDY, progress=False)


def test_shares_are_shares_and_agree(report):
    streaming = np.asarray(report["head_streaming"])
    budgets = np.asarray(report["head_budget_fraction"])
    np.testing.assert_allclose(streaming.mean(axis=(1, 2)), report["streaming_fraction"])
    np.testing.assert_allclose(
        budgets.mean(axis=(1, 2)), np.asarray(report["budget_fraction"])[:, 0]
    )
    assert ((streaming >= 0) & (streaming <= 1)).all()
    # A head that always streams has no budget, and whoever has none streams.
    np.testing.assert_array_equal(streaming == 1, budgets == 0)
    assert (np.diff(report["streaming_fraction"]) >= 0).all()
    assert (np.diff(report["budget_fraction"], axis=0) <= 0).all()
    assert all(
        g <= s
        for g, s in zip(report["streaming_groups"], report["streaming_fraction"], strict=True)
    )
    assert 0 < report["budget_fraction"][0][0] < 1


def test_the_figure_shows_every_layer_and_head(report):
    figure = heads_figure(report, 0.1)
    maps = [axes for axes in figure.axes if axes.images]
    shape = np.asarray(report["head_streaming"]).shape[1:]
    assert [axes.images[0].get_array().shape for axes in maps[:2]] == [shape, shape]
    with pytest.raises(ConfigError, match="expected a tolerance of"):
        heads_figure(report, 0.15)


def test_the_command_writes_table_and_figure(model, tmp_path, capsys):
    arguments = ["--length", "1536", "--samples", "1", "--steps", "2", "--output", str(tmp_path)]
    assert cli.main(["heads", "--model", str(model), *arguments]) == 0
    assert "| tolerance | streaming heads |" in capsys.readouterr().out
    assert json.loads((tmp_path / "heads.json").read_text())["evaluation"] == "heads"
    assert (tmp_path / "heads.png").stat().st_size > 10_000
