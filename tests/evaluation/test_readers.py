"""Readers on small made files of the exact formats, and the metrics of those benchmarks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fluxion_jax import cli
from fluxion_jax.errors import ConfigError, FluxionError, IntegrityError
from fluxion_jax.evaluation import METRICS, metrics
from fluxion_jax.evaluation.data import load_data, truncated
from fluxion_jax.evaluation.readers import LEVAL_OPEN, LONGBENCH, READERS
from fluxion_jax.models import load_model
from tests.cli.conftest import model as model


def write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def longbench_row(**changes: object) -> dict[str, object]:
    row = {
        "input": "Who?",
        "context": "A {brace} and a story.",
        "answers": ["Ann", "Ann Lee"],
        "length": 5,
        "dataset": "x",
        "language": "en",
        "all_classes": None,
        "_id": "1",
    }
    return {**row, **changes}


def read(name: str, path: Path) -> list:
    return list(READERS[name](path))


def test_longbench_with_its_own_templates(tmp_path):
    write(tmp_path / "data" / "qasper.jsonl", longbench_row())
    write(tmp_path / "data" / "lcc_e.jsonl", longbench_row(input="", answers=["x = 1"]))
    classes = ["Food", "City", "Other city"]
    trec = longbench_row(input="Type:", answers=["City"], all_classes=classes)
    write(tmp_path / "data" / "trec.jsonl", trec)
    write(tmp_path / "data" / "dureader.jsonl", longbench_row())
    (tmp_path / "config").mkdir()
    template = "Article: {context}\n\nQ: {input}\nA:"
    (tmp_path / "config" / "dataset2prompt.json").write_text(json.dumps({"qasper": template}))
    code, qasper, kinds = read("longbench", tmp_path / "data")
    assert qasper.prompt == "Article: A {brace} and a story.\n\nQ: Who?\nA:"
    assert qasper.references == ("Ann", "Ann Lee")
    assert (qasper.metric, qasper.max_new_tokens, qasper.chat) == ("token_f1", 128, True)
    assert (code.task, code.metric, code.chat) == ("lcc_e", "code_line", False)
    assert code.prompt == "A {brace} and a story."
    assert kinds.references == ("City", "Food", "Other city")
    assert all(metric in METRICS for metric, _ in LONGBENCH.values())
    assert len(LONGBENCH) == 18
    assert len(LEVAL_OPEN) == 13


def test_longbench2(tmp_path):
    row = {f"choice_{x}": f" choice {x} " for x in "ABCD"}
    row |= {"question": "Which?", "context": " $Q$ text ", "answer": "C", "domain": "Code"}
    (tmp_path / "data.json").write_text(json.dumps([row]))
    (made,) = read("longbench2", tmp_path)
    assert "$Q$ text" in made.prompt
    assert "Question: Which?" in made.prompt
    assert "(D) choice D" in made.prompt
    assert (made.task, made.metric, made.references) == ("longbench2: Code", "choice", ("C",))
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "0shot.txt").write_text("<$DOC$> $Q$ $C_A$")
    assert read("longbench2", tmp_path / "data.json")[0].prompt == "<$Q$ text> Which? choice A"


def test_leval(tmp_path):
    row = {"input": "Doc", "instructions": ["Sum it", "Why?"], "outputs": ["a b c", "d"]}
    row |= {"source": "", "evaluation": "rouge"}
    write(tmp_path / "meeting_summ.jsonl", row, {**row, "evaluation": "LLM"})
    write(tmp_path / "quality.jsonl", {**row, "evaluation": "exam", "outputs": ["(B) x", "C"]})
    write(tmp_path / "codeU.jsonl", row)
    first, second, *closed = read("leval", tmp_path)
    assert "Doc" in first.prompt
    assert "Instruction: Sum it\nAnswer with 3 words." in first.prompt
    assert (first.references, second.references) == (("a b c",), ("d",))
    assert {r.metric for r in (first, second)} == {"rouge_l"}
    assert [r.metric for r in closed] == ["letters"] * 2


def test_ruler(tmp_path):
    row = {"index": 0, "input": "Text? It", "outputs": ["7", "8"], "length": 9}
    write(tmp_path / "niah_multivalue" / "validation.jsonl", row)
    write(tmp_path / "qa_1.jsonl", {**row, "answer_prefix": " is"})
    needle, question = read("ruler", tmp_path)
    assert (needle.task, needle.metric, needle.max_new_tokens) == ("niah_multivalue", "all", 128)
    assert needle.references == ("7", "8")
    assert (question.metric, question.max_new_tokens, question.answer_prefix) == ("part", 32, " is")


def test_the_middle_is_what_is_left_out(tmp_path, model):
    assert truncated(range(10), 5) == [0, 1, 2, 8, 9]
    assert truncated(range(4), 5) == [0, 1, 2, 3]
    assert truncated(range(4), 1) == [0]
    loaded = load_model(model)
    long = longbench_row(context="start " + "m" * 500 + " end", input="question")
    write(tmp_path / "hotpotqa.jsonl", long, longbench_row(), longbench_row())
    first, second = load_data(f"longbench:{tmp_path}", loaded, length_tokens=200, samples=2)
    assert 150 < len(first.tokens) <= 200 - 32
    assert first.prompt.startswith("start mmm")
    assert first.prompt.endswith("end\n\nquestion\nAnswer:")
    assert second.prompt == "A {brace} and a story.\n\nWho?\nAnswer:"
    chatted, _ = load_data(f"longbench:{tmp_path}", loaded, length_tokens=200, samples=2, chat=True)
    text = loaded.tokenizer.decode(chatted.tokens, skip_special=False)
    assert text.startswith("<|im_start|>user\nstart")
    assert text.endswith("<|im_start|>assistant\n")
    assert len(chatted.tokens) <= 200 - 32


def test_the_command_answers_published_data(capsys, tmp_path, model):
    rows = [{"input": "x" * n, "outputs": ["7"]} for n in (30, 40)]
    write(tmp_path / "vt" / "validation.jsonl", *rows)
    arguments = ["evaluate", "--model", str(model), "--data", f"ruler:{tmp_path}", "--json"]
    assert cli.main([*arguments, "--length", "1280", "--batch", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {(row["task"], row["samples"]) for row in report["rows"]} == {("vt", 2)}
    assert report["text_rows"] == []
    assert cli.main([*arguments, "--task", "cwe"]) == 2
    assert "expected questions of cwe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x:y", "expected FORMAT:PATH with a format of ruler, longbench, longbench2, leval"),
        ("ruler:none", "expected a file or a folder, got 'none'"),
        ("ruler:{}/empty", "expected questions of any task .* got only nothing"),
        ("longbench:{}/qasper.jsonl", "expected input, context, answers in each entry .* entry 1"),
    ],
)
def test_what_is_not_there_is_refused(tmp_path, model, source, message):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "qasper.jsonl", {"input": ""})
    with pytest.raises(ConfigError, match=message):
        load_data(source.format(tmp_path), load_model(model))


def test_a_broken_file_is_refused(tmp_path):
    (tmp_path / "qasper.jsonl").write_text("{")
    with pytest.raises(IntegrityError, match=r"expected JSON in .*qasper"):
        read("longbench", tmp_path)


def test_metrics_of_the_benchmarks():
    # Longest common subsequence 2 of 3 and 4 words: precision 2/3, recall 1/2.
    assert metrics.rouge_l("the cat ran", ["a dog", "the cat sat down"]) == pytest.approx(4 / 7)
    assert metrics.first_line_rouge_l("\nthe cat\nmore", ["the cat"]) == 1
    assert metrics.first_line_token_f1("Ann\nQuestion: Bob", ["ann"]) == 1
    assert metrics.classification("City or Food", ["City", "Food", "Sea"]) == 0.5
    assert metrics.classification("Other city", ["Other city", "city"]) == 1
    assert metrics.classification("Food\nCity", ["City", "Food"]) == 0
    assert metrics.number("Paragraph 3, not 4", ["Paragraph 3"]) == 0.5
    assert metrics.number("none", ["3"]) == 0
    assert metrics.code_line("\n# note\nx = 1\ny", ["x = 1"]) == 1
    assert metrics.choice("**The correct answer is (B)**", ["B"]) == 1
    assert metrics.choice("B", ["B"]) == 0
    assert metrics.letters("A, C", ["AC"]) == 1
    assert metrics.letters("The answer: B.", ["B"]) == 1
    assert metrics.letters("AB", ["A"]) == 0


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(FluxionError, match=r"install fluxion-jax\[evaluation\]"):
        metrics.rouge_l("a", ["a"])
