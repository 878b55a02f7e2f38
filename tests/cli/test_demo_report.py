"""What is shown of measurements; the measurements here are made up."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fluxion_jax import cli, demo, plotting
from fluxion_jax.errors import ConfigError, FluxionError
from fluxion_jax.fidelity import PolicyReport, compare_policies
from fluxion_jax.models import load_model
from tests.generation import tiny


def made_up() -> demo.DemoReport:
    fidelity = [
        PolicyReport("full", 256, 7.123, None, None, 50 * 2**20, 1.0, [1.0] * 3, [0.0] * 3),
        PolicyReport(
            "fixed:16:0.05", 256, 7.4, 0.961, 0.05, 9.5 * 2**20, 0.152, [0.9, 0.8, 0.7],
            [0.01, 0.02, 0.03],
        ),
    ]  # fmt: skip
    texts = {"full": "7305", "fixed:16:0.05": "73 05"}
    return demo.DemoReport("tiny", 6000, "What code?", "7305", texts, texts, fidelity)


def test_the_report_as_text():
    lines = demo.render(made_up()).splitlines()
    assert lines[0] == "tiny, 6000 tokens of text, KV cache in host memory"
    full, sparse = (line.split() for line in lines if "MiB" not in line and "%" in line)
    assert full == ["full", "50.00", "100.0%", "reference", "7.123", "1.000", "0.0000"]
    assert sparse == ["fixed:16:0.05", "9.50", "15.2%", "96.1%", "7.400", "0.800", "0.0200"]
    assert any("7305" in line and "planted" in line for line in lines)
    assert "fidelity, not speed" in lines[-1]


def test_the_figure_shows_every_policy(tmp_path: Path):
    figure = plotting.fidelity_figure(made_up().fidelity, "A title")
    assert len(figure.axes) == 4
    assert figure.get_suptitle() == "A title"
    texts = [t.get_text() for axes in figure.axes for t in axes.texts]
    assert "9.5" in texts
    assert "96.1 %\nperplexity 7.40" in texts
    np.testing.assert_allclose(figure.axes[2].lines[1].get_ydata(), [0.9, 0.8, 0.7])
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_the_error_figure_joins_policies_of_a_kind():
    full, *_ = made_up().fidelity
    others = [
        dataclasses.replace(
            full, policy=name, host_bytes_per_token=mib * 2**20, output_error=[e, 0]
        )
        for name, mib, e in (
            ("fluxion:tolerance=0.1", 3, 0.2), ("fixed:16:0.05", 9, 0.3), ("fixed:16:0.02", 4, 0.5),
        )
    ]  # fmt: skip
    (axes,) = plotting.error_figure([full, *others], "A title").axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert drawn == {"fluxion": [[3, 0.1]], "fixed": [[4, 0.25], [9, 0.15]]}
    assert {text.get_text() for text in axes.texts} == {"0.1", "16:0.05", "16:0.02"}


def test_a_missing_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(FluxionError, match=r"install fluxion-jax\[plot\]"):
        plotting.require_matplotlib()


@pytest.mark.parametrize("as_json", [False, True])
def test_the_demo_command(capsys, monkeypatch, tmp_path: Path, as_json: bool):
    def run_demo(model: str, **options: object) -> demo.DemoReport:
        assert model == "gemma3-270m"
        assert (options["context_tokens"], options["scored_tokens"]) == (500, 7)
        options["say"]("loading")
        return made_up()

    monkeypatch.setattr(demo, "run_demo", run_demo)
    arguments = ["demo", "--model", "gemma3-270m", "--context-tokens", "500"]
    arguments += ["--scored-tokens", "7", "--output", str(tmp_path)]
    assert cli.main([*arguments, *(["--json"] if as_json else [])]) == 0
    captured = capsys.readouterr()
    document = json.loads((tmp_path / "demo.json").read_text())
    assert document == made_up().to_dict()
    expected = json.dumps(document, indent=2) if as_json else demo.render(made_up())
    assert captured.out == expected + "\n"
    assert captured.err == f"loading\nfigure: {tmp_path / 'demo.png'}\n"
    assert (tmp_path / "demo.png").stat().st_size > 10_000


def test_a_folder_that_cannot_be_made_is_noticed_before_the_work(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "run_demo", lambda *_, **__: pytest.fail("worked first"))
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--output", str(tmp_path / "file")]) == 1
    assert "file" in capsys.readouterr().err


@pytest.mark.parametrize("tokens", [10, 100_000])
def test_a_context_that_does_not_fit_is_refused(model: Path, tokens: int):
    with pytest.raises(ConfigError, match=f"expected a context of .* tokens .* got {tokens}"):
        demo.run_demo(str(model), context_tokens=tokens, progress=False)


def test_a_model_without_a_tokenizer_is_refused(model: Path, tmp_path: Path):
    shutil.copytree(model, tmp_path / "mute")
    (tmp_path / "mute" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"expected a model with a tokenizer, got .*mute"):
        demo.run_demo(str(tmp_path / "mute"), progress=False)


def test_the_document_holds_the_fact_and_goes_on_with_the_text(model: Path):
    loaded = load_model(model)
    tokens, following = demo._document(loaded, 2000, 100)
    assert len(tokens) == 2000
    assert len(following) == 100
    text = loaded.tokenizer.decode(tokens, skip_special=False)
    # The tiny tokenizer knows no digits.
    fact = demo.FACT.replace("7305", "")
    assert text.startswith("<|im_start|>")
    assert 0.3 < text.index(fact) / len(text) < 0.4
    whole = loaded.tokenizer.encode(demo.long_text())
    end = next(i for i in range(200, len(whole)) if whole[i - 200 : i] == tokens[-200:])
    assert following == whole[end : end + 100]


def test_policies_are_compared_on_the_same_state():
    cache = tiny.prefilled(tiny.llama(), tiny.prompts())
    before = np.asarray(cache.lengths)
    following = np.asarray(tiny.prompts((7, 7, 7), seed=2))
    told = compare_policies(
        tiny.llama(), cache, following, ["full", "fixed:16:0.05", "full"], progress=False
    )
    np.testing.assert_array_equal(cache.lengths, before)
    assert [r.policy for r in told] == ["full", "fixed:16:0.05", "full"]
    assert told[0].agreement is None
    assert told[0].log_prob_difference is None
    assert told[2].agreement == 1.0
    assert told[2].log_prob_difference == 0.0
    assert told[0].num_tokens == 18
    assert told[0].read_fraction == 1.0
    # Sequences this short are read whole by default, whatever the policy.
    assert told[1].agreement == 1.0
    assert told[1].read_fraction == 1.0
    assert told[1].perplexity == pytest.approx(told[0].perplexity, rel=1e-5)
    assert len(told[0].recall) == len(told[0].output_error) == 2
    json.dumps([r.to_dict() for r in told], allow_nan=False)
