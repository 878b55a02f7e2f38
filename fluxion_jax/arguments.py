"""Checks what a generation is asked for, before anything is compiled or written."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from fluxion_jax.cache.host_kv import HostKV, require_buffers
from fluxion_jax.decode import NO_TOKEN
from fluxion_jax.errors import ConfigError, FluxionError, require

Prompts = Sequence[int] | Sequence[Sequence[int]] | np.ndarray

# Stop tokens are filled up to a multiple of this, so that one more of them does not recompile.
_STOP_SLOTS = 8


def check_prompts(prompts: Prompts, model: Any) -> list[list[int]]:
    """Turns one prompt or several into lists of token ids.

    Raises:
      ConfigError: there is none, one is empty, or holds something else than the model's ids.
    """
    listed: Any = prompts
    if isinstance(listed, bytes) or not (hasattr(listed, "shape") or isinstance(listed, Iterable)):
        raise ConfigError(
            f"expected prompts as lists of integer token ids, got {type(prompts).__name__}; pass "
            "one list, or one per row"
        )
    rows = np.atleast_1d(np.asarray(prompts)).tolist() if hasattr(prompts, "shape") else [*prompts]
    if rows and not isinstance(rows[0], Sequence | np.ndarray | jax.Array):
        rows = [rows]
    if not rows:
        raise ConfigError("expected at least one prompt, got none")
    checked = []
    for index, row in enumerate(rows):
        ids = _as_ids(row, f"prompt {index} as a list of integer token ids")
        if ids.ndim != 1:
            raise ConfigError(
                f"expected prompt {index} as a list of integer token ids, got an array of shape "
                f"{ids.shape}; pass one list per row"
            )
        if ids.size == 0:
            raise ConfigError(f"expected at least one token in prompt {index}, got an empty prompt")
        _check_range(ids, model, f"prompt {index}")
        checked.append([int(i) for i in ids])
    return checked


def check_scored(
    tokens: np.ndarray | Sequence[Sequence[int]], cache: HostKV, model: Any
) -> np.ndarray:
    """Turns tokens to score into int32 `[B, S + 1]`.

    Raises:
      ConfigError: the shape does not fit the cache, or they are not ids of the model.
    """
    require("cache", cache, HostKV, "allocate one with HostKV.allocate")
    ids = _as_ids(tokens, "as many integer token ids to score in each row")
    if ids.ndim != 2 or ids.shape[0] != cache.batch or ids.shape[1] < 2:
        raise ConfigError(
            f"expected tokens of shape [{cache.batch}, at least 2], got {list(ids.shape)}"
        )
    _check_range(ids, model, "the tokens to score")
    return ids.astype(np.int32)


def check_cache(cache: HostKV, model: Any, new_tokens: np.ndarray) -> None:
    """Raises unless a cache fits the model and has room for int `[B]` new tokens.

    Raises:
      ConfigError: it has another batch, or is that of another model.
      FluxionError: its buffers are gone, or an error of an earlier step is pending.
      CacheFullError: a row would grow beyond the cache.
    """
    require("cache", cache, HostKV, "allocate one with HostKV.allocate")
    if len(new_tokens) != cache.batch:
        raise ConfigError(f"expected {cache.batch} prompts for this cache, got {len(new_tokens)}")
    config, layout = model.config, cache.layout
    for name in (
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "sliding_window",
        "sliding_layers",
    ):
        of_cache = getattr(layout, name)
        of_model = getattr(config, name, of_cache)
        # A layout need not name its query heads.
        unnamed = name == "num_heads" and of_cache is None
        if of_model != of_cache and not unnamed:
            raise ConfigError(
                f"expected a cache with {name}={of_model} like the model, got {of_cache}; "
                "allocate it with model.config.kv_layout()"
            )
    require_buffers(cache)
    try:
        cache.check()
    except FluxionError as error:
        raise FluxionError(
            f"expected a cache without a pending error, got: {error}; to go on behind the last "
            "good step, use what cache.clear_status() returns"
        ) from None
    cache.require_room(new_tokens)
    limit = getattr(config, "max_context_tokens", None)
    longest = int((np.asarray(cache.lengths) + new_tokens)[np.asarray(cache.active)].max(initial=0))
    if limit is not None and longest > limit:
        raise ConfigError(
            f"expected at most {limit} tokens, the context the model was made for, got {longest} "
            "with the new ones; shorten the prompt or ask for fewer tokens"
        )


def check_recorded(cache: HostKV, policy: Any) -> None:
    """Raises ConfigError if the plans for this cache cannot be recorded and replayed."""
    if not cache.layout.global_layers:
        raise ConfigError(
            "expected a model with a layer that attends to everything for Execution(record=True), "
            "got sliding windows in all layers; nothing is planned for them"
        )
    if cache.layout.num_heads is None:
        raise ConfigError(
            "expected a cache whose layout names its query heads for Execution(record=True), got "
            "num_heads=None; allocate it with model.config.kv_layout()"
        )
    if np.asarray(getattr(policy, "per_group", False)).any():
        raise ConfigError(
            f"expected a policy that ranks each head by itself for Execution(record=True), got "
            f"{policy}; replayed plans have no shared rankings"
        )


def stop_slots(stop_tokens: Sequence[int]) -> np.ndarray:
    """Stop tokens, int32, filled up with `NO_TOKEN`."""
    try:
        if isinstance(stop_tokens, bytes):
            raise TypeError
        ids = [operator.index(token) for token in stop_tokens]
    except TypeError:
        raise ConfigError(
            f"expected integer token ids as stop_tokens, got {stop_tokens!r}; encode text with the "
            "model's tokenizer"
        ) from None
    beyond = [token for token in ids if abs(token) > np.iinfo(np.int32).max]
    if beyond:
        raise ConfigError(
            f"expected token ids below 2**31 as stop_tokens, got {beyond}; are these the model's "
            "own tokens?"
        )
    free = _STOP_SLOTS if not ids else -len(ids) % _STOP_SLOTS
    return np.asarray([*ids, *[NO_TOKEN] * free], np.int32)


def _as_ids(values: Any, expected: str) -> np.ndarray:
    try:
        ids = np.asarray(values)
    except ValueError:
        raise ConfigError(f"expected {expected}, got lists of different lengths") from None
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise ConfigError(
            f"expected {expected}, got {ids.dtype}; encode text with the model's tokenizer"
        )
    return ids


def _check_range(ids: np.ndarray, model: Any, where: str) -> None:
    size = model.config.vocab_size
    bad = ids[(ids < 0) | (ids >= size)]
    if bad.size:
        raise ConfigError(
            f"expected token ids within [0, {size}) in {where}, got {bad[:5].tolist()}; "
            "is this the model's own tokenizer?"
        )
