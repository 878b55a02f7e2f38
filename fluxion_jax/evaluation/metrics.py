"""How answers are scored, each from 0 to 1, as the published benchmarks do."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from fluxion_jax.errors import FluxionError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def share_found(prediction: str, references: Sequence[str]) -> float:
    """Share of the references that the prediction contains, whatever their case."""
    text = prediction.lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def any_found(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction contains one of the references, whatever its case."""
    text = prediction.lower()
    return float(any(reference.lower() in text for reference in references))


def normalised(text: str) -> str:
    """Lower case, without punctuation, English articles and superfluous blanks."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """Best harmonic mean of precision and recall over normalised words."""
    return max(_f1(normalised(prediction).split(), normalised(r).split()) for r in references)


def accuracy(prediction: str, references: Sequence[str]) -> float:
    """1 if the normalised prediction equals a normalised reference."""
    return float(normalised(prediction) in {normalised(r) for r in references})


def edit_similarity(prediction: str, references: Sequence[str]) -> float:
    """Best `2 LCS / (sum of lengths)`: similarity by insertions and deletions of characters.

    That is the `ratio` by which code completion is usually judged.
    """
    return max(_ratio(prediction, reference) for reference in references)


def edit_similarity_of_lines(prediction: str, references: Sequence[str]) -> float:
    """Edit similarity of as many lines of the prediction as the reference has."""
    return max(
        _ratio("\n".join(prediction.split("\n")[: len(r.split("\n"))]), r) for r in references
    )


def _f1(got: Sequence[str], wanted: Sequence[str]) -> float:
    shared = sum((Counter(got) & Counter(wanted)).values())
    return 2 * shared / (len(got) + len(wanted)) if shared else 0.0


def _ratio(first: str, second: str) -> float:
    total = len(first) + len(second)
    return 2 * longest_common_subsequence(first, second) / total if total else 1.0


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, row by row with a set of bits per symbol."""
    places: dict[str, int] = {}
    for i, symbol in enumerate(first):
        places[symbol] = places.get(symbol, 0) | 1 << i
    everything = (1 << len(first)) - 1
    row = everything
    for symbol in second:
        matched = row & places.get(symbol, 0)
        row = ((row + matched) | (row - matched)) & everything
    return len(first) - row.bit_count()


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Best ROUGE-L F-measure, by the `rouge-score` package, without stemming.

    Raises:
      FluxionError: the package is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise FluxionError(
            "expected the package rouge-score for ROUGE-L, got none; install "
            "fluxion-jax[evaluation]"
        ) from error
    scorer = RougeScorer(["rougeL"])
    return max(float(scorer.score(r, prediction)["rougeL"].fmeasure) for r in references)


def first_line_rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L of the prediction's first line: few-shot prompts make models go on."""
    return rouge_l(_first_line(prediction), references)


def first_line_token_f1(prediction: str, references: Sequence[str]) -> float:
    """Token F1 of the prediction's first line."""
    return token_f1(_first_line(prediction), references)


def classification(prediction: str, references: Sequence[str]) -> float:
    """One over the number of classes named in the first line, if the right one is among them.

    Args:
      prediction: the answer.
      references: the right class, then all other classes. A class whose name is part of the right
        one's does not count as named.
    """
    right, *others = references
    line = _first_line(prediction)
    wrong = [name for name in others if name in line and name not in right]
    return 1 / (1 + len(wrong)) if right in line else 0.0


def number(prediction: str, references: Sequence[str]) -> float:
    """Share of the numbers in the prediction that are the reference's first number."""
    (wanted,) = re.findall(r"\d+", references[0])[:1]
    found = re.findall(r"\d+", prediction)
    return found.count(wanted) / len(found) if found else 0.0


def code_line(prediction: str, references: Sequence[str]) -> float:
    """Edit similarity of the prediction's first line that is neither comment nor markup."""
    lines = prediction.lstrip("\n").split("\n")
    code = [line for line in lines if not any(mark in line for mark in ("`", "#", "//"))]
    return edit_similarity(code[0] if code else "", references)


def choice(prediction: str, references: Sequence[str]) -> float:
    """1 if "The correct answer is X" names the right one of the choices A to D."""
    found = re.search(r"The correct answer is \(?([A-D])", prediction.replace("*", ""))
    return float(found is not None and found.group(1) == references[0])


def letters(prediction: str, references: Sequence[str]) -> float:
    """1 if the letters A to D that the prediction begins with are those of the reference."""
    found = re.search(r"\b[A-D](?:[\s,]*[A-D])*\b", prediction)
    wanted = re.match(r"[A-D]+", references[0].strip())
    return float(
        found is not None
        and wanted is not None
        and set(re.findall("[A-D]", found.group())) == set(wanted.group())
    )


def _first_line(text: str) -> str:
    return text.lstrip("\n").split("\n")[0]


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "all": share_found,
    "part": any_found,
    "token_f1": token_f1,
    "accuracy": accuracy,
    "edit_similarity": edit_similarity,
    "edit_similarity_of_lines": edit_similarity_of_lines,
    "rouge_l": rouge_l,
    "first_line_rouge_l": first_line_rouge_l,
    "first_line_token_f1": first_line_token_f1,
    "classification": classification,
    "number": number,
    "code_line": code_line,
    "choice": choice,
    "letters": letters,
}


def bootstrap_interval(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean; of paired differences, it is a paired interval.

    Args:
      values: one per sample, at least one.
      confidence: share of the resampled means inside.
      resamples: 2000, because the ends then vary by about a hundredth of their distance.
      seed: the same seed gives the same interval.
    """
    data = np.asarray(values, np.float64)
    picks = np.random.default_rng(seed).integers(0, len(data), (resamples, len(data)))
    tail = 50 * (1 - confidence)
    low, high = np.percentile(data[picks].mean(axis=1), [tail, 100 - tail])
    return float(low), float(high)
