"""Readers of published benchmarks in their own formats, from the user's disk.

Where a benchmark's own prompt templates lie beside the data, they are used; otherwise a plain
wording of this package, with which scores come close to published ones but do not repeat them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fluxion_jax.errors import ConfigError, IntegrityError

Row = dict[str, Any]


class Record(NamedTuple):
    """One question of a benchmark, whatever its length.

    Attributes:
      task: name of the task.
      prompt: text.
      references: accepted answers; see the metric.
      metric: a name out of `metrics.METRICS`.
      max_new_tokens: tokens to generate at most.
      answer_prefix: text that the answer begins with, behind a chat's turn.
      chat: whether a chat model should be asked in its chat format.
    """

    task: str
    prompt: str
    references: tuple[str, ...]
    metric: str
    max_new_tokens: int
    answer_prefix: str = ""
    chat: bool = True


# Metric and tokens to generate of LongBench's tasks. Three Chinese ones are missing: their scores
# need a Chinese word segmenter.
LONGBENCH = {
    "narrativeqa": ("token_f1", 128),
    "qasper": ("token_f1", 128),
    "multifieldqa_en": ("token_f1", 64),
    "hotpotqa": ("token_f1", 32),
    "2wikimqa": ("token_f1", 32),
    "musique": ("token_f1", 32),
    "gov_report": ("rouge_l", 512),
    "qmsum": ("rouge_l", 512),
    "multi_news": ("rouge_l", 512),
    "trec": ("classification", 64),
    "triviaqa": ("first_line_token_f1", 32),
    "samsum": ("first_line_rouge_l", 128),
    "lsht": ("classification", 64),
    "passage_count": ("number", 32),
    "passage_retrieval_en": ("number", 32),
    "passage_retrieval_zh": ("number", 32),
    "lcc": ("code_line", 64),
    "repobench-p": ("code_line", 64),
}
# Few-shot and code tasks continue a text, which a chat's turn would break.
_CONTINUED = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
_PLAIN = "{context}\n\n{input}\nAnswer:"
_PLAIN_CONTINUED = "{context}{input}"

LONGBENCH2_NEW_TOKENS = 128
_PLAIN_CHOICES = (
    "Read the text and answer the question about it.\n\n$DOC$\n\nQuestion: $Q$\n(A) $C_A$\n"
    "(B) $C_B$\n(C) $C_C$\n(D) $C_D$\n\nBegin your answer with: The correct answer is"
)

LEVAL_OPEN = (
    "financial_qa",
    "gov_report_summ",
    "legal_contract_qa",
    "meeting_summ",
    "multidoc_qa",
    "narrative_qa",
    "natural_question",
    "news_summ",
    "paper_assistant",
    "patent_summ",
    "review_summ",
    "scientific_qa",
    "tv_show_summ",
)
LEVAL_OPTIONS = ("coursera", "quality", "tpo")
LEVAL_NEW_TOKENS = 512
# Others are judged by people or by a model.
_LEVAL_METRICS = {"f1": "token_f1", "rouge": "rouge_l"}

RULER_NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}


def read_longbench(path: Path) -> Iterator[Record]:
    """LongBench: `TASK.jsonl` or `TASK_e.jsonl` with `input`, `context`, `answers`, `all_classes`.

    Its templates are taken from `config/dataset2prompt.json` in the folder or one above it.
    """
    templates: dict[str, str] = json.loads(_beside(path, "config/dataset2prompt.json") or "{}")
    for file in _files(path):
        task = file.stem
        known = task.removesuffix("_e")
        if known not in LONGBENCH:
            continue
        metric, max_new_tokens = LONGBENCH[known]
        continued = known in _CONTINUED
        template = templates.get(known, _PLAIN_CONTINUED if continued else _PLAIN)
        for row in _rows(file, "input", "context", "answers"):
            answers = tuple(row["answers"])
            if metric == "classification":
                others = [name for name in row["all_classes"] or () if name != answers[0]]
                answers = (answers[0], *others)
            # Not str.format: documents and templates may hold braces.
            pieces = template.split("{context}")
            pieces = [piece.replace("{input}", row["input"]) for piece in pieces]
            prompt = row["context"].join(pieces)
            yield Record(task, prompt, answers, metric, max_new_tokens, chat=not continued)


def read_longbench2(path: Path) -> Iterator[Record]:
    """LongBench v2: `data.json`, one list with `question`, `choice_A` to `choice_D`, `answer`.

    The task is the row's `domain`. The template is taken from `prompts/0shot.txt` in the folder or
    one above it.
    """
    template = _beside(path, "prompts/0shot.txt") or _PLAIN_CHOICES
    for file in _files(path):
        names = ("context", "question", "choice_A", "choice_B", "choice_C", "choice_D", "answer")
        for row in _rows(file, *names):
            prompt = template
            for mark, name in (("$Q$", "question"), *((f"$C_{x}$", f"choice_{x}") for x in "ABCD")):
                prompt = prompt.replace(mark, row[name].strip())
            prompt = prompt.replace("$DOC$", row["context"].strip())
            task = f"longbench2: {row.get('domain', 'all')}"
            yield Record(task, prompt, (row["answer"],), "choice", LONGBENCH2_NEW_TOKENS)


def read_leval(path: Path) -> Iterator[Record]:
    """L-Eval: `TASK.jsonl` with `input`, `instructions`, `outputs` and `evaluation`.

    The 13 open-ended tasks, those rows of them that are judged by F1 or ROUGE, and the three closed
    ones with options.
    """
    for file in _files(path):
        task = file.stem
        if task not in (*LEVAL_OPEN, *LEVAL_OPTIONS):
            continue
        for row in _rows(file, "input", "instructions", "outputs", "evaluation"):
            metric = "letters" if task in LEVAL_OPTIONS else _LEVAL_METRICS.get(row["evaluation"])
            if metric is None:
                continue
            for instruction, output in zip(row["instructions"], row["outputs"], strict=True):
                wanted = (
                    "Answer with the letters of the right options."
                    if metric == "letters"
                    else f"Answer with {len(output.split())} words."
                )
                prompt = (
                    "Follow the instruction after this document.\n\n"
                    f"{row['input']}\n\nInstruction: {instruction}\n{wanted}\nAnswer:"
                )
                yield Record(task, prompt, (output,), metric, LEVAL_NEW_TOKENS)


def read_ruler(path: Path) -> Iterator[Record]:
    """RULER's generated files: `TASK/validation.jsonl` with `input` and `outputs`."""
    for file in _files(path):
        task = file.parent.name if file.stem in ("validation", "test") else file.stem
        kind = task.split("_")[0]
        if kind not in RULER_NEW_TOKENS:
            continue
        metric = "part" if kind == "qa" else "all"
        for row in _rows(file, "input", "outputs"):
            yield Record(
                task,
                row["input"],
                tuple(row["outputs"]),
                metric,
                RULER_NEW_TOKENS[kind],
                row.get("answer_prefix", ""),
            )


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    "ruler": read_ruler,
    "longbench": read_longbench,
    "longbench2": read_longbench2,
    "leval": read_leval,
}


def _files(path: Path) -> list[Path]:
    """A file, or all JSON files of a folder and those below it."""
    if path.is_file():
        return [path]
    found = sorted(p for p in path.rglob("*.json*") if p.suffix in (".json", ".jsonl"))
    return [p for p in found if p.parent.name != "config"]


def _rows(file: Path, *names: str) -> Iterator[Row]:
    """The objects of a JSON list or of a file with one object a line, checked for their names."""
    text = file.read_text(encoding="utf-8")
    try:
        if file.suffix == ".json":
            rows = json.loads(text)
        else:
            # Not splitlines: documents hold other line separators, unescaped.
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:
        raise IntegrityError(
            f"expected JSON in {file}, got something else: {error}; download it again"
        ) from error
    for number, row in enumerate(rows, 1):
        missing = [n for n in names if not isinstance(row, dict) or n not in row]
        if missing:
            raise ConfigError(
                f"expected {', '.join(names)} in each entry of {file}, got none named "
                f"{missing[0]} in entry {number}; is it of another benchmark?"
            )
        yield row


def _beside(path: Path, name: str) -> str | None:
    """Text of a file of the benchmark's repository, looked for in the folder and above it."""
    folder = path if path.is_dir() else path.parent
    for place in (folder, *list(folder.resolve().parents)[:2]):
        if (place / name).is_file():
            return (place / name).read_text(encoding="utf-8")
    return None
