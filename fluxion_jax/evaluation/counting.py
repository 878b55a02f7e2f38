"""Tasks whose answer depends on much of the context: variables, common and frequent words.

The structure and the numbers are those of RULER (arXiv 2404.06654, appendix B); the words and the
wording are this package's own.
"""

from __future__ import annotations

import itertools
import random
import string

from fluxion_jax.evaluation.samples import Draft, Request, Task
from fluxion_jax.evaluation.words import noise_lines, numbers, plain_words

NUM_HOPS = 4
NUM_COMMON = 10
# Below this length the published task repeats words less, or they would not fit.
_SHORT_TOKENS = 4096
_ZETA_EXPONENT = 2.0
_ZETA_OF_2 = 1.6449340668482264
_CODED_LETTERS = 6
_TOKENS_PER_CODED_WORD = 50


def _chain(rng: random.Random, lines: int, letters: int) -> tuple[str, str, list[str]]:
    """Noise with one chain of assignments in it, its value, and its variables in order."""
    found: list[str] = []
    while len(found) <= NUM_HOPS:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name not in found:
            found.append(name)
    (value,) = numbers(rng, 1, digits=5)
    statements = [f"VAR {found[0]} = {value}"]
    statements += [f"VAR {b} = VAR {a}" for a, b in itertools.pairwise(found)]
    hay = noise_lines(max(lines, NUM_HOPS))
    places = sorted(rng.sample(range(len(hay) + 1), len(statements)))
    for offset, (place, statement) in enumerate(zip(places, statements, strict=True)):
        hay.insert(place + offset, statement)
    return "\n".join(hay), value, found


def _variables(request: Request) -> Draft:
    def ask(text: str, value: str) -> str:
        return (
            "Follow the chain of variable assignments hidden in the following text.\n"
            f"{text}\nQuestion: Which variables have the value {value} in the text above?\n"
            f"Answer: By the assignments in the text above, {NUM_HOPS + 1} variables have the "
            f"value {value}:"
        )

    text, value, found = _chain(request.rng, request.size + NUM_HOPS, letters=5)
    shown, shown_value, shown_names = _chain(request.rng, NUM_HOPS, letters=3)
    example = f"{ask(shown, shown_value)} {' '.join(shown_names)}"
    return Draft(f"{example}\n\n{ask(text, value)}", tuple(found), None)


def _word_list(
    rng: random.Random, words: list[str], common_times: int, other_times: int
) -> tuple[str, list[str]]:
    common, others = words[:NUM_COMMON], words[NUM_COMMON:]
    listed = common * common_times + others * other_times
    rng.shuffle(listed)
    return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1)), common


def _common_words(request: Request) -> Draft:
    def ask(listed: str) -> str:
        return (
            "Below is a numbered list of words. Some of them appear more often than the others; "
            f"remember those.\n{listed}\nQuestion: What are the {NUM_COMMON} most common words in "
            f"the list above?\nAnswer: The {NUM_COMMON} most common words in the list are:"
        )

    short = request.length_tokens < _SHORT_TOKENS
    times, shown_times, shown_count = ((6, 1), (3, 1), 20) if short else ((30, 3), (10, 3), 40)
    words = plain_words(request.rng, shown_count + NUM_COMMON + request.size)
    shown, shown_common = _word_list(request.rng, words[:shown_count], *shown_times)
    listed, common = _word_list(request.rng, words[shown_count:], *times)
    answer = " ".join(f"{i}. {word}" for i, word in enumerate(shown_common, 1))
    return Draft(f"{ask(shown)} {answer}\n\n{ask(listed)}", tuple(common), None)


def _frequent_words(request: Request) -> Draft:
    rng = request.rng
    count = max(4, request.length_tokens // _TOKENS_PER_CODED_WORD)
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(rng.choices(string.ascii_lowercase, k=_CODED_LETTERS))] = None
    ranked = ["...", *list(words)[1:]]
    # The ranks asked for must differ in their counts, so the smallest size is not one word.
    total = request.size + 64
    text = [
        word
        for rank, word in enumerate(ranked, 1)
        for _ in range(int(total * rank**-_ZETA_EXPONENT / _ZETA_OF_2))
    ]
    rng.shuffle(text)
    prompt = (
        "Read the following coded text and keep count of each coded word.\n"
        f"{' '.join(text)}\nQuestion: Ignore the dots '...'. What are the three most frequent "
        "coded words in the text above?\nAnswer: The three most frequent coded words in the text "
        "above are:"
    )
    return Draft(prompt, tuple(ranked[1:4]), None)


COUNTING_TASKS = (
    Task("vt", _variables, 30, "all"),
    Task("cwe", _common_words, 120, "all"),
    Task("fwe", _frequent_words, 50, "all"),
)
