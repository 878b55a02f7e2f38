"""The runner on a tiny random model: the same answers as without it, kept, resumed and compared."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import fluxion_jax as fx
from fluxion_jax import cli
from fluxion_jax.errors import ConfigError
from fluxion_jax.evaluation import METRICS, Settings, answers, evaluate, figures, report, runner
from fluxion_jax.evaluation.real_text import spread, stretches
from fluxion_jax.fidelity import divergence
from fluxion_jax.models import load_model
from tests.cli.conftest import model as model
from tests.policy.test_fluxion_policy import random_policy

# Beyond the length up to which everything is read.
LENGTH = 1280
SETTINGS = Settings(
    policies=("fixed:128:0.02",),
    tasks=("passkey", "real_text"),
    lengths_tokens=(LENGTH,),
    samples=2,
    batch=1,
    scored_tokens=12,
)


@pytest.fixture(scope="module")
def loaded(model: Path):
    return load_model(model)


@pytest.fixture(scope="module")
def found(loaded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    made = evaluate(loaded, SETTINGS, folder=folder, progress=False)
    return made, folder


def test_answers_are_those_of_generate(loaded, found):
    made, _ = found
    samples = runner.task_samples(loaded, "passkey", LENGTH, range(2))
    assert [s["seed"] for s in made["samples"]] == [0, 0, 1, 1]
    for kept in made["samples"]:
        sample = samples[kept["seed"]]
        assert kept["depth_fraction"] == sample.depth_fraction
        result = fx.generate(
            loaded,
            list(sample.tokens),
            policy=kept["policy"],
            max_new_tokens=sample.max_new_tokens,
            progress=False,
        )
        text = loaded.tokenizer.decode(result.tokens[0].tolist())
        assert kept["text"] == text
        assert kept["score"] == METRICS[sample.metric](text, sample.references)


def test_rows_compare_with_full_attention(loaded, found):
    made, _ = found
    json.dumps(made, allow_nan=False)
    full, sparse = made["rows"]
    assert (full["policy"], sparse["policy"]) == ("full", "fixed:128:0.02")
    assert full["samples"] == sparse["samples"] == 2
    assert full["difference"] == 0
    assert full["same_prefix"] == 1
    assert 0 < sparse["host_bytes_per_token"] < full["host_bytes_per_token"]
    assert sparse["read_fraction"] < full["read_fraction"] == 1
    full, sparse = made["text_rows"]
    assert (full["kl"], full["agreement"], full["log_perplexity_difference"]) == (0, 1, 0)
    assert full["recall"] == pytest.approx(1)
    assert sparse["kl"] > 1e-6
    assert sparse["recall"] < 1
    assert made["stamp"]["versions"]["jax"]
    assert set(made["prompts_sha256"]) == {f"passkey:{LENGTH}"}


def test_real_text_scores_are_those_of_the_dense_model(loaded, found):
    made, _ = found
    tokens = loaded.tokenizer.encode(runner.long_text())
    given = np.asarray(stretches(tokens, LENGTH, range(2)))
    logits = np.asarray(loaded.model(given), np.float64)[:, -13:-1]
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    wanted = np.take_along_axis(log_probs, given[:, -12:, None], axis=-1).mean()
    assert np.log(made["text_rows"][0]["perplexity"]) == pytest.approx(-wanted, rel=1e-4)


def test_finished_cells_are_not_computed_again(loaded, found, monkeypatch):
    made, folder = found
    with monkeypatch.context() as patched:
        for name in ("generate", "prefill"):
            patched.setattr(answers, name, lambda *_, **__: pytest.fail("computed again"))
        again = evaluate(loaded, SETTINGS, folder=folder, progress=False)
        assert again["rows"] == made["rows"]
        assert again["samples"] == made["samples"]
        other = Settings(**{**vars(SETTINGS), "seed": 5})
        with pytest.raises(pytest.fail.Exception, match="computed again"):
            evaluate(loaded, other, folder=folder, progress=False)


def test_divergence_of_known_distributions():
    def scores(*rows):
        logs = np.log(np.asarray([rows], np.float32))
        return fx.Scores(logs[..., 0], np.zeros(logs.shape[:2], np.int32), None, logs)

    reference = scores([0.5, 0.5], [0.9, 0.1])
    wanted = [0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75), 0]
    np.testing.assert_allclose(
        divergence(reference, scores([0.25, 0.75], [0.9, 0.1])), [wanted], atol=1e-6
    )


def test_scores_of_batches_are_paired_by_sample():
    def batch(*scores):
        return [
            {
                "policy": name,
                "score": list(s),
                "same_prefix": [1.0] * len(s),
                "text": [""] * len(s),
                "host_bytes_per_token": size,
                "read_fraction": 0.5,
            }
            for name, s, size in zip(("full", "x"), scores, (30.0, 10.0), strict=True)
        ]

    cells = [batch((1, 0, 1), (0, 1, 1)), batch((1,), (0,))]
    cells[1][1]["host_bytes_per_token"] = 50.0
    full, other = report.answer_rows("t", 9, cells)
    assert (full["score"], other["score"], other["difference"]) == (0.75, 0.5, -0.25)
    assert other["interval"][0] < -0.25 < other["interval"][1]
    assert other["host_bytes_per_token"] == pytest.approx((3 * 10 + 50) / 4)
    assert answers._same_prefix([1, 2, 3, 4], [1, 2, 9, 4]) == 0.5
    assert answers._same_prefix([1, 2], [1]) == 0.5


def test_depths_spread_evenly_whatever_the_number():
    depths = sorted(spread(i) for i in range(13))
    assert max(np.diff([0, *depths, 1])) < 2.7 / 13
    samples = [
        {"depth_fraction": d, "length_tokens": 5, "score": float(d > 0.5), "policy": "full"}
        for d in (0.0, 0.3, 0.9, 1.0)
    ]
    np.testing.assert_array_equal(figures._by_depth(samples, [5], 2), [[0], [100]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ("x",)}, "expected tasks out of niah_single_1, .*real_text, got 'x'"),
        ({"samples": 0}, "expected samples >= 1, got 0"),
        ({"lengths_tokens": (10,)}, "expected lengths of at least 66 tokens, got 10"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        Settings(**change)


def test_what_does_not_fit_is_refused(loaded, model, tmp_path):
    with pytest.raises(ConfigError, match=r"expected lengths of at most .* got 1000000"):
        evaluate(loaded, Settings(lengths_tokens=(1_000_000,)))
    with pytest.raises(ConfigError, match="expected a length of at most 5 tokens"):
        stretches([1] * 5, 6, [0])
    shutil.copytree(model, tmp_path / "mute")
    (tmp_path / "mute" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="expected a model with a tokenizer"):
        evaluate(str(tmp_path / "mute"))


def test_policies_that_print_alike_must_be_the_same(loaded):
    """As weights of two folders do at one tolerance: one of them must not vanish."""
    alike = random_policy(seed=1), random_policy(seed=2)
    assert str(alike[0]) == str(alike[1])
    with pytest.raises(ConfigError, match=r"got two different ones that print fluxion:tol.*=0\.1;"):
        evaluate(loaded, dataclasses.replace(SETTINGS, policies=alike), progress=False)
    given = ("fixed:16:0.05", "full", fx.fixed(16, 0.05), random_policy(seed=1), alike[0])
    policies = runner._with_reference(given, loaded)
    assert [str(p) for p in policies] == ["full", "fixed:16:0.05", "fluxion:tolerance=0.1"]


def test_the_command(capsys, monkeypatch, tmp_path, found):
    made, _ = found
    seen = {}

    def evaluated(name, settings, **options):
        seen.update(name=name, settings=settings, **options)
        return made

    monkeypatch.setattr(runner, "evaluate", evaluated)
    arguments = ["evaluate", "--model", "m", "--policy", "full", "--policy", "fixed:32:0.1"]
    arguments += ["--task", "vt", "--length", "1024", "--samples", "9", "--output", str(tmp_path)]
    assert cli.main(arguments) == 0
    assert seen["name"] == "m"
    assert seen["settings"] == Settings(("full", "fixed:32:0.1"), ("vt",), (1024,), 9)
    assert seen["folder"] == tmp_path / "cells"
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 2 + 2 + 2
    assert f"| passkey | {LENGTH} | fixed:128:0.02 | 2 |" in out
    written = json.loads((tmp_path / "evaluate.json").read_text())
    tables = json.loads(json.dumps(made))
    samples = tables.pop("samples")
    assert written == tables
    with gzip.open(tmp_path / "evaluate-samples.jsonl.gz", "rt") as lines:
        assert [json.loads(line) for line in lines] == samples
    for name in ("depth", "quality"):
        assert (tmp_path / f"evaluate-{name}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_a_shared_prefix_gives_the_same_table(loaded, found, tmp_path):
    made, _ = found
    settings = dataclasses.replace(SETTINGS, batch=2, shared_prefix=True)
    # What comes later is compared with the same reference.
    evaluate(loaded, dataclasses.replace(settings, policies=()), folder=tmp_path, progress=False)
    settings = dataclasses.replace(settings, policies=(*SETTINGS.policies, "oracle:0.3"))
    together = evaluate(loaded, settings, folder=tmp_path, workers=2, progress=False)
    assert together["settings"]["shared_prefix"]
    assert together["prompts_sha256"] == made["prompts_sha256"]
    for row in made["rows"]:
        (own,) = [r for r in together["rows"] if r["policy"] == row["policy"]]
        for name in ("score", "same_prefix", "host_bytes_per_token", "read_fraction"):
            assert own[name] == pytest.approx(row[name]), name
    (oracle,) = [r for r in together["rows"] if r["policy"] == "oracle:0.3"]
    assert 0 <= oracle["read_fraction"] <= 1
    for row in made["text_rows"]:
        (own,) = [r for r in together["text_rows"] if r["policy"] == row["policy"]]
        for name in ("stretches", "agreement", "host_bytes_per_token", "read_fraction"):
            assert own[name] == pytest.approx(row[name]), name
        for name in ("perplexity", "log_perplexity_difference", "interval", "kl"):
            assert own[name] == pytest.approx(row[name], rel=1e-3, abs=1e-6), name
        assert own["recall"] is own["output_error"] is None
    assert "| 1280 | oracle:0.3 | 2 |" in report.render(together)
    assert together["text_rows"][2]["policy"] == "oracle:0.3"
    assert 0 < together["text_rows"][2]["kl"] < 1
    again = evaluate(loaded, settings, folder=tmp_path, progress=False)
    assert (again["rows"], again["text_rows"]) == (together["rows"], together["text_rows"])
