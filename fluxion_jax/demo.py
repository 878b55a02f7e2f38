"""The demo: a real model answers from a long real text with its KV cache in host memory.

It plants a fact in a stretch of the Python documentation that every Python carries, asks for it,
lets the model go on with the text, and measures how far sparse attention departs from full.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fluxion_jax.cache.host_kv import HostKV
from fluxion_jax.errors import ConfigError, UnsupportedError
from fluxion_jax.fidelity import PolicyReport, compare_policies
from fluxion_jax.generation import generate, prefill
from fluxion_jax.models.load import LoadedModel, load_model

POLICIES = ("full", "fixed:16:0.05", "fixed:16:0.02")
FACT = "The special magic number for the observatory is 7305."
QUESTION = "What is the special magic number for the observatory?"
ANSWER = "7305"

# Long prose topics; by name, because their order and number differ between Python versions.
DEMO_TOPICS = (
    "objects",
    "typesseq",
    "exceptions",
    "execmodel",
    "naming",
    "import",
    "with",
    "try",
    "class",
    "function",
    "types",
    "strings",
    "formatstrings",
    "specialnames",
)
_ANSWER_TOKENS = 16
_CONTINUATION_TOKENS = 40
# The fact lies a third into the text: behind the sinks and far before the recent tokens.
_FACT_DEPTH = 1 / 3


@dataclasses.dataclass
class DemoReport:
    """Everything the demo found.

    Attributes:
      model: name of the model.
      context_tokens: length of the text, planted fact included.
      question: what was asked.
      expected: the planted answer.
      answers: per policy, what the model answered.
      continuations: per policy, how the model went on with the text.
      fidelity: one report per policy.
    """

    model: str
    context_tokens: int
    question: str
    expected: str
    answers: dict[str, str]
    continuations: dict[str, str]
    fidelity: list[PolicyReport]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        return dataclasses.asdict(self)


def long_text() -> str:
    """Real English prose out of the standard library, tens of thousands of words."""
    topics = importlib.import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[name] for name in DEMO_TOPICS if name in topics)


def run_demo(
    model_name: str = "smollm2-135m",
    *,
    context_tokens: int = 6000,
    scored_tokens: int = 256,
    policies: Sequence[str] = POLICIES,
    progress: bool | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> DemoReport:
    """Runs the demo.

    Args:
      model_name: see `load_model`.
      context_tokens: length of the text in tokens.
      scored_tokens: decode steps over which fidelity is measured, at least 1.
      policies: the first is the reference.
      progress: show progress bars; None shows them on a terminal and in a notebook.
      say: told in one line what happens next.

    Raises:
      ConfigError: the text is shorter than asked for, or longer than the model's context.
    """
    say(f"loading {model_name}")
    model = load_model(model_name)
    if model.tokenizer is None:
        raise ConfigError(f"expected a model with a tokenizer, got {model_name} without one")
    tokens, following = _document(model, context_tokens, scored_tokens)
    question = _question(model)
    room = max(len(question) + _ANSWER_TOKENS, scored_tokens + 1, _CONTINUATION_TOKENS)
    cache = HostKV.allocate(
        model.config.kv_layout("float32" if _is_float32(model) else "bfloat16"),
        batch=1,
        max_tokens=len(tokens) + room,
    )
    say(f"reading {len(tokens)} tokens into a KV cache in host memory")
    prefill(model, tokens[:-1], cache, progress=progress)
    say(str(cache))

    say(f"asking: {QUESTION}")
    asked = cache.fork()
    prefill(model, [tokens[-1], *question[:-1]], asked, progress=progress)
    answers = {
        policy: _continue(model, asked, question[-1], policy, _ANSWER_TOKENS, progress)
        for policy in policies
    }
    del asked
    say("continuing the text")
    continuations = {
        policy: _continue(model, cache, tokens[-1], policy, _CONTINUATION_TOKENS, progress)
        for policy in policies
    }
    say(f"comparing the policies over {scored_tokens} decode steps of the real continuation")
    given = np.asarray([[tokens[-1], *following]])
    fidelity = compare_policies(model, cache, given, policies, progress=progress)
    return DemoReport(model_name, len(tokens), QUESTION, ANSWER, answers, continuations, fidelity)


def _document(
    model: LoadedModel, context_tokens: int, scored_tokens: int
) -> tuple[list[int], list[int]]:
    """The start of a chat turn with the text in it, the fact planted, and how the text goes on."""
    assert model.tokenizer is not None
    start, _ = _turn(model)
    fact = model.tokenizer.encode(f"\n\n{FACT}\n\n", add_bos=False)
    text = model.tokenizer.encode(long_text(), add_bos=False)
    length = context_tokens - len(start) - len(fact)
    limit = model.config.max_context_tokens
    needed = context_tokens + scored_tokens + 64
    if length < 64 or length + scored_tokens > len(text) or needed > limit:
        raise ConfigError(
            f"expected a context of {len(start) + len(fact) + 64} to "
            f"{min(len(text) - scored_tokens, limit - scored_tokens - 64)} tokens for this model "
            f"and text, got {context_tokens}"
        )
    planted = int(length * _FACT_DEPTH)
    tokens = [*start, *text[:planted], *fact, *text[planted:length]]
    return tokens, text[length : length + scored_tokens]


def _turn(model: LoadedModel) -> tuple[list[int], list[int]]:
    """What stands before and behind what a user says, in the model's chat format if it has one."""
    assert model.tokenizer is not None
    marker = "\u241e"
    try:
        ids = model.tokenizer.chat([{"role": "user", "content": marker}])
    except UnsupportedError:
        # A base model has no chat format; a text that ends in "Answer:" asks it as well.
        return model.tokenizer.encode(""), model.tokenizer.encode("\nAnswer:", add_bos=False)
    before, behind = model.tokenizer.decode(ids, skip_special=False).split(marker)
    return (
        model.tokenizer.encode(before, add_bos=False),
        model.tokenizer.encode(behind, add_bos=False),
    )


def _question(model: LoadedModel) -> list[int]:
    assert model.tokenizer is not None
    _, end = _turn(model)
    return [*model.tokenizer.encode(f"\n\nQuestion: {QUESTION}", add_bos=False), *end]


def _continue(
    model: LoadedModel,
    cache: HostKV,
    token: int,
    policy: str,
    max_new_tokens: int,
    progress: bool | None,
) -> str:
    assert model.tokenizer is not None
    result = generate(
        model,
        [token],
        policy=policy,
        max_new_tokens=max_new_tokens,
        cache=cache.fork(),
        progress=progress,
    )
    return model.tokenizer.decode(result.tokens[0].tolist()).strip()


def _is_float32(model: LoadedModel) -> bool:
    return bool(model.model.embedding[...].dtype == np.float32)


def render(report: DemoReport) -> str:
    """The report as text for a terminal."""
    width = max(len(r.policy) for r in report.fidelity)
    lines = [
        f"{report.model}, {report.context_tokens} tokens of text, KV cache in host memory",
        "",
        f"Question: {report.question}   (planted: {report.expected})",
        *(f"  {name:<{width}}  {text}" for name, text in report.answers.items()),
        "",
        "Continuation:",
        *(f"  {name:<{width}}  {' '.join(t.split())}" for name, t in report.continuations.items()),
        "",
        f"Fidelity over {report.fidelity[0].num_tokens} teacher-forced decode steps:",
        f"  {'policy':<{width}}  {'MiB/token':>9}  {'K/V read':>8}  {'same token':>10}  "
        f"{'perplexity':>10}  {'recall':>6}  {'out. error':>10}",
    ]
    for r in report.fidelity:
        same = "reference" if r.agreement is None else f"{r.agreement:.1%}"
        lines.append(
            f"  {r.policy:<{width}}  {r.host_bytes_per_token / 2**20:>9.2f}  "
            f"{r.read_fraction:>8.1%}  {same:>10}  {r.perplexity:>10.3f}  "
            f"{np.mean(r.recall):>6.3f}  {np.mean(r.output_error):>10.4f}"
        )
    lines.append("")
    lines.append("Recall and output error are means over layers, heads and steps; a model this")
    lines.append("small on a CPU shows fidelity, not speed.")
    return "\n".join(lines)
