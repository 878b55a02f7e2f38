from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fluxion_jax as fx
from fluxion_jax import cli
from fluxion_jax.models import load_model

REPOSITORY = Path(__file__).parents[2]


def run(*arguments: object) -> int:
    """The exit code, whoever raises it."""
    try:
        return cli.main([str(a) for a in arguments])
    except SystemExit as end:
        return int(end.code or 0)


def generate(model: object, prompt: object, *more: object) -> int:
    return run("generate", "--model", model, "--prompt-file", prompt, "--max-new-tokens", 6, *more)


@pytest.mark.parametrize("command", [(), ("info",), ("generate",), ("demo",)])
def test_help(capsys, command):
    assert run(*command, "--help") == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: fluxion")
    if command:
        assert "--json" in out
        assert "--output" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "required: COMMAND"),
        (("train",), "invalid choice: 'train'"),
        (("generate",), "required: --model, --prompt-file"),
        (("generate", "--model", "x"), "required: --prompt-file"),
        (("info", "--max-new-tokens", "1"), "unrecognized arguments"),
        (("generate", "--max-new-tokens", "many"), "invalid int value: 'many'"),
    ],
)
def test_wrong_usage_is_2(capsys, arguments, message):
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_info(capsys, tmp_path):
    assert run("info", "--json", "--output", tmp_path / "deep" / "folder") == 0
    out = capsys.readouterr().out
    report = json.loads(out)
    assert report["versions"]["jax"]
    assert "host_library" in report
    written = json.loads((tmp_path / "deep" / "folder" / "info.json").read_text())
    assert written["versions"] == report["versions"]
    assert run("info") == 0
    assert report["versions"]["jax"] in capsys.readouterr().out


def test_info_as_a_module_from_anywhere(tmp_path):
    finished = subprocess.run(
        [sys.executable, "-m", "fluxion_jax", "info", "--json"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["versions"]["jax"]


def test_generate_prints_the_answer_and_the_figures_apart(capsys, model, prompt):
    assert generate(model, prompt) == 0
    plain = capsys.readouterr()
    assert generate(model, prompt, "--json") == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["text"] + "\n" == plain.out
    assert "tokens in" in plain.err
    assert "tokens in" in captured.err
    loaded = load_model(model)
    ids = loaded.tokenizer.encode(prompt.read_text())
    expected = fx.generate(loaded, ids, max_new_tokens=6).tokens[0].tolist()
    assert report["tokens"] == expected
    assert report["prompt_tokens"] == len(ids)
    assert report["policy"] == "full"
    assert report["model"] == str(model)
    assert report["stats"]["num_tokens"] == len(expected)
    assert loaded.tokenizer.decode(expected) == report["text"]


def test_generate_reads_standard_input_and_writes_files(
    capsys, monkeypatch, tmp_path, model, prompt
):
    assert generate(model, prompt, "--json") == 0
    expected = json.loads(capsys.readouterr().out)
    monkeypatch.setattr(sys, "stdin", io.StringIO(prompt.read_text()))
    folder = tmp_path / "results"
    assert generate(model, "-", "--policy", "fixed:32:0.02:group", "--output", folder) == 0
    report = json.loads((folder / "generate.json").read_text())
    # So short a prompt is read whole under any policy.
    assert report["tokens"] == expected["tokens"]
    assert report["policy"] == "fixed:32:0.02:group"
    assert capsys.readouterr().out == report["text"] + "\n"


def test_generate_samples(capsys, model, prompt):
    def tokens(*more: object) -> list[int]:
        assert generate(model, prompt, "--json", *more) == 0
        return json.loads(capsys.readouterr().out)["tokens"]

    hot = ("--temperature", 3, "--top-p", 1)
    assert tokens(*hot, "--seed", 1) == tokens(*hot, "--seed", 1)
    assert len({tuple(tokens(*hot, "--seed", seed)) for seed in (1, 2, 3)}) > 1


def test_generate_with_the_chat_format(capsys, model, prompt):
    assert generate(model, prompt, "--json", "--chat") == 0
    chatted = json.loads(capsys.readouterr().out)["prompt_tokens"]
    assert generate(model, prompt, "--json") == 0
    assert chatted > json.loads(capsys.readouterr().out)["prompt_tokens"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", "fixed:17:0.05"), "a granularity of (16, 32, 64, 128) tokens, got 17"),
        (("--policy", "best"), "'fixed:GRANULARITY:FRACTION'"),
        (("--split", "cpu"), "'adaptive', 'adaptive:FILE' or a host fraction in [0, 1], got 'cpu'"),
        (("--max-new-tokens", "0"), "max_new_tokens >= 1, got 0"),
        (("--temperature", "-1"), "temperature > 0, got -1.0"),
        (("--temperature", "1", "--top-p", "2"), "top-p in (0, 1], got 2.0"),
    ],
)
def test_values_out_of_range_are_2(capsys, model, prompt, arguments, message):
    assert generate(model, prompt, "--json", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fluxion: expected ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_model_that_is_not_there_is_2(capsys, tmp_path, prompt):
    assert generate(tmp_path / "none", prompt) == 2
    assert "none', which does not exist; check the path" in capsys.readouterr().err


def test_a_foreign_file_is_1(capsys, tmp_path, prompt):
    foreign = tmp_path / "model.gguf"
    foreign.write_text("PK, or something else")
    assert generate(foreign, prompt) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("fluxion: ")
    assert "model.gguf" in captured.err
    assert captured.out == ""


def test_a_folder_without_a_model_is_1(capsys, tmp_path, prompt):
    (tmp_path / "empty").mkdir()
    assert generate(tmp_path / "empty", prompt) == 1
    assert "config.json" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_is_2(capsys, tmp_path, model, prompt):
    folder = tmp_path / "mute"
    shutil.copytree(model, folder)
    (folder / "tokenizer.json").unlink()
    assert generate(folder, prompt) == 2
    assert "expected a model with a tokenizer" in capsys.readouterr().err


def test_a_prompt_that_is_not_there_is_1(capsys, tmp_path, model):
    assert generate(model, tmp_path / "none.txt") == 1
    assert "none.txt" in capsys.readouterr().err
    assert generate(model, tmp_path) == 1


@pytest.mark.parametrize("content", [b"", b" \n\t"])
def test_a_blank_prompt_is_2(capsys, tmp_path, model, content):
    (tmp_path / "blank.txt").write_bytes(content)
    assert generate(model, tmp_path / "blank.txt") == 2
    assert "got nothing but blanks" in capsys.readouterr().err


def test_a_prompt_that_is_no_text_is_2(capsys, monkeypatch, tmp_path, model):
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    assert generate(model, tmp_path / "bytes.txt") == 2
    assert "expected UTF-8 text in" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    assert generate(model, "-") == 2
    assert "expected UTF-8 text in -" in capsys.readouterr().err


def test_an_output_that_is_a_file_is_1(capsys, prompt):
    assert run("info", "--output", prompt) == 1
    assert "prompt.txt" in capsys.readouterr().err


def test_ctrl_c_is_1(capsys, monkeypatch, model, prompt):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fluxion_jax.generation.generate", interrupted)
    assert generate(model, prompt, "--json") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "fluxion: interrupted\n"
