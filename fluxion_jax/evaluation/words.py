"""Words, values and filler for the tasks; made for this package, so that nothing is downloaded."""

from __future__ import annotations

import itertools
import random
import re
import uuid
from functools import cache

from fluxion_jax.demo import long_text
from fluxion_jax.errors import ConfigError

# Short sentences only, so that a haystack comes close to any length; no tables and no code.
_PROSE = re.compile(r"[A-Z][\w ,;:'\"()-]{20,150}[.!?]")

NOISE = (
    "The field is wide.",
    "The river is cold.",
    "The road is long.",
    "On we walk.",
    "Home is far away.",
)

_ADJECTIVES_TEXT = """
able amber ample azure bold brave brief bright brisk broad calm candid careful cheerful civil
clean clear clever cosy crisp curious daring deep eager early easy elegant exact fair faint famous
fancy fast fine firm fluent fond formal frank fresh gentle glad golden grand great green handy
happy hardy honest humble ideal jolly keen kind large lasting late lively local loud loyal lucky
mellow mild modest narrow neat noble novel odd open patient plain polite proud pure quick quiet
rapid rare ready rich round royal rustic secret serene sharp shiny silent simple sincere sleepy
slow smart smooth sober solid spare steady still stout strong subtle sunny swift tall tender tidy
tiny tough vast vivid warm wild wise witty young
"""
_ADJECTIVES = tuple(_ADJECTIVES_TEXT.split())

_NOUNS_TEXT = """
anchor apple apron arch arrow badge ball band bank barn basin basket beach bead beam bell bench
berry bird blade boat bolt bone book boot bottle bowl box branch brick bridge brook broom brush
bucket bush button cabin cable cake camp candle cane cape card cart castle cave chain chair chalk
chest circle clay cliff clock cloth cloud coat coin comb cone cork corn crane creek crown cup desk
dial dish dock door dove drum dune eagle ember engine fern field flag flame flask flute fork fox
frame frost gate gem glass globe glove goat grain grape grove hammer harbor hat hawk hedge helmet
hill hinge hook horn house island ivory jar jewel kettle key kite knot ladder lake lamp lane leaf
lemon lens lily lion lock loom maple mask meadow mill mint mirror moon moss mountain nest net oak
oar orchard owl paddle page palm path pearl pebble pen pine pipe pocket pond pot quilt rail raven
reed ribbon ring river rock roof root rope rose saddle sail salt sand seed shell ship shoe shore
silk sled spoon spring star stone storm stove stream table tent thorn tide tower trail tree valley
vase wagon wall wave well wheel willow wind window wing wolf wool
"""
_NOUNS = tuple(_NOUNS_TEXT.split())


def noise_lines(count: int) -> list[str]:
    """Lines of five short sentences each, all the same."""
    return [" ".join(NOISE)] * count


@cache
def _sentences() -> tuple[str, ...]:
    text = " ".join(long_text().split())
    return tuple(s for s in re.split(r"(?<=[.!?]) ", text) if _PROSE.fullmatch(s))


def essay_sentences(count: int) -> list[str]:
    """Sentences of real prose out of the standard library, from its start again where it ends."""
    return list(itertools.islice(itertools.cycle(_sentences()), count))


def names(rng: random.Random, count: int) -> list[str]:
    """Different adjective-noun compounds such as `brave-river`.

    Raises:
      ConfigError: more are asked for than there are.
    """
    picks = _pick(rng, len(_ADJECTIVES) * len(_NOUNS), count)
    return [f"{_ADJECTIVES[i % len(_ADJECTIVES)]}-{_NOUNS[i // len(_ADJECTIVES)]}" for i in picks]


def plain_words(rng: random.Random, count: int) -> list[str]:
    """Different single words, each of two nouns in one such as `riverstone`.

    Raises:
      ConfigError: more are asked for than there are.
    """
    return [
        _NOUNS[i % len(_NOUNS)] + _NOUNS[i // len(_NOUNS)]
        for i in _pick(rng, len(_NOUNS) ** 2, count)
    ]


def numbers(rng: random.Random, count: int, digits: int = 7) -> list[str]:
    """Different numbers of so many digits, the first of them not 0."""
    first = 10 ** (digits - 1)
    return [str(first + i) for i in _pick(rng, 9 * first, count)]


def uuids(rng: random.Random, count: int) -> list[str]:
    """Random UUIDs of version 4."""
    return [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(count)]


def _pick(rng: random.Random, available: int, count: int) -> list[int]:
    if count > available:
        raise ConfigError(
            f"expected at most {available} different words in a sample, got {count}; ask for a "
            "shorter length"
        )
    return rng.sample(range(available), count)
