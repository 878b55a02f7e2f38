"""Published questions as samples for a model: truncated in the middle, in its chat format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fluxion_jax.errors import ConfigError
from fluxion_jax.evaluation.readers import READERS, Record
from fluxion_jax.evaluation.samples import Sample
from fluxion_jax.models.load import LoadedModel
from fluxion_jax.models.tokenizer import Tokenizer


def load_data(
    source: str,
    model: LoadedModel,
    *,
    length_tokens: int | None = None,
    tasks: Sequence[str] | None = None,
    samples: int | None = None,
    chat: bool = False,
) -> list[Sample]:
    """Reads a benchmark and makes samples of its questions.

    Args:
      source: `FORMAT:PATH`; the format is a name out of `READERS`, the path a file or a folder.
      model: its tokenizer and its context count.
      length_tokens: prompt and answer together, at most; longer prompts lose their middle. None
        takes the model's context.
      tasks: only these; None takes all.
      samples: only the first so many of each task; None takes all.
      chat: put prompts into the model's chat format, where the benchmark does not advise against.

    Raises:
      ConfigError: unknown format, no such file, nothing found, or the length is not possible.
      IntegrityError: a file is not JSON.
    """
    name, _, path = source.partition(":")
    if name not in READERS or not path:
        raise ConfigError(
            f"expected FORMAT:PATH with a format of {', '.join(READERS)}, got {source!r}"
        )
    folder = Path(path).expanduser()
    if not folder.exists():
        raise ConfigError(f"expected a file or a folder, got {path!r}; check the path")
    if model.tokenizer is None:
        raise ConfigError(f"expected a model with a tokenizer, got {model.name} without one")
    limit = model.config.max_context_tokens
    length = limit if length_tokens is None else length_tokens
    if not 0 < length <= limit:
        raise ConfigError(f"expected a length of 1 to {limit} tokens, got {length}; change it")
    counts: Counter[str] = Counter()
    found, seen = [], set()
    for record in READERS[name](folder):
        seen.add(record.task)
        wanted = tasks is None or record.task in tasks
        if wanted and (samples is None or counts[record.task] < samples):
            found.append(_sample(record, counts[record.task], model.tokenizer, length, chat))
            counts[record.task] += 1
    missing = [task for task in tasks or () if task not in seen]
    if missing or not found:
        raise ConfigError(
            f"expected questions of {missing[0] if missing else 'any task'} in {path}, got only "
            f"{', '.join(sorted(seen)) or 'nothing'}; check format, path and tasks"
        )
    return found


def truncated(tokens: Sequence[int], limit: int) -> list[int]:
    """Without the middle, if there are more than `limit`: the ends hold instructions."""
    if len(tokens) <= limit:
        return list(tokens)
    head = limit - limit // 2
    return [*tokens[:head], *tokens[len(tokens) - limit // 2 :]]


def _sample(
    record: Record, index: int, tokenizer: Tokenizer, length_tokens: int, chat: bool
) -> Sample:
    room = length_tokens - record.max_new_tokens
    whole = tokenizer.encode(record.prompt, add_bos=False)
    limit, text = len(whole), record.prompt
    while len(tokens := _encode(record, text, tokenizer, chat)) > room:
        # Text that is cut and encoded again may have a few tokens more.
        limit = min(limit, room) - 8 if limit > room else limit - (len(tokens) - room)
        if limit < 1:
            raise ConfigError(
                f"expected room for a prompt of {record.task} besides {record.max_new_tokens} "
                f"tokens of its answer, got length_tokens={length_tokens}; ask for more"
            )
        text = tokenizer.decode(truncated(whole, limit), skip_special=False)
    return Sample(
        task=record.task,
        seed=index,
        length_tokens=length_tokens,
        prompt=text,
        tokens=tuple(tokens),
        references=record.references,
        max_new_tokens=record.max_new_tokens,
        metric=record.metric,
        depth_fraction=None,
    )


def _encode(record: Record, text: str, tokenizer: Tokenizer, chat: bool) -> list[int]:
    if not (chat and record.chat):
        return tokenizer.encode(text + record.answer_prefix)
    prefix = tokenizer.encode(record.answer_prefix, add_bos=False) if record.answer_prefix else []
    return [*tokenizer.chat([{"role": "user", "content": text}]), *prefix]
