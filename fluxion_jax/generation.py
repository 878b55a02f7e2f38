"""Generating, streaming, scoring and prefill: the functions that users call."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fluxion_jax.arguments import (
    Prompts,
    check_cache,
    check_prompts,
    check_scored,
)
from fluxion_jax.attention import Execution
from fluxion_jax.cache.host_kv import HostKV
from fluxion_jax.decode import NO_TOKEN, Steps
from fluxion_jax.errors import FluxionError, require_integer
from fluxion_jax.interrupt import cancel_word
from fluxion_jax.policy.protocol import Policy
from fluxion_jax.policy.replay_policy import ReplayPolicy, recorded_plans
from fluxion_jax.policy.split import Split
from fluxion_jax.sampling import Sampling
from fluxion_jax.session import CHUNK_TOKENS, Session, read_prompts, unwrap
from fluxion_jax.stats import DecodeStats


@dataclasses.dataclass
class Result:
    """What `generate` returns.

    Attributes:
      tokens: per row the generated tokens, int32 `[S]`, each row with an S of its own; a stop
        token is included.
      log_probs: per row the natural log of the probability of each of them, float32 `[S]`.
      stats: counts and times.
      cache: the cache, all fed tokens included; the last generated token has not been fed yet.
      plans: every step's plans, with `Execution(record=True)`: a policy that repeats this
        generation, here or from a file (`save`). Otherwise None.

    Example:
      >>> import fluxion_jax as fx
      >>> from fluxion_jax.models import Decoder, ModelConfig
      >>> model = Decoder.random(ModelConfig.tiny_llama())
      >>> prompt = list(range(100))

      >>> result = fx.generate(model, prompt, max_new_tokens=4)
      >>> result.tokens[0].dtype, result.log_probs[0].shape, result.cache.lengths.tolist()
      (dtype('int32'), (4,), [103])
    """

    tokens: list[np.ndarray]
    log_probs: list[np.ndarray]
    stats: DecodeStats
    cache: HostKV
    plans: ReplayPolicy | None = None

    def __str__(self) -> str:
        first = ", ".join(map(str, self.tokens[0][:8])) if self.tokens else ""
        more = ", ..." if self.tokens and len(self.tokens[0]) > 8 else ""
        return f"Result of {len(self.tokens)} rows, the first [{first}{more}]\n{self.stats}"


@dataclasses.dataclass
class Step:
    """One step of a stream.

    Attributes:
      tokens: int32 `[B]`, a token per row; -1 for rows that have finished.
      log_probs: float32 `[B]`.
    """

    tokens: np.ndarray
    log_probs: np.ndarray


def generate(
    model: Any,
    prompts: Prompts,
    *,
    policy: str | Policy | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    stop_tokens: Sequence[int] | None = None,
    cache: HostKV | None = None,
    split: str | float | Split | None = None,
    execution: Execution | None = None,
    seed: int = 0,
    chunk_tokens: int = CHUNK_TOKENS,
    progress: bool | None = None,
) -> Result:
    """Generates text for a batch of prompts of any lengths.

    Args:
      model: a `models.LoadedModel`, a `models.Decoder`, or an NNX module with the same
        `prefill_chunk` and `decode_step`.
      prompts: one list of token ids, or one per row.
      policy: what each head may read, a name such as `"full"` or `"fixed:16:0.05"`, or an object;
        None for `"fluxion"` where there are calibrated weights for the model, and `"full"`
        elsewhere. A given cache that keeps no sketch is read by `"full"` too.
      max_new_tokens: at most so many tokens per row.
      sampling: how tokens are drawn; None for `greedy()`.
      stop_tokens: tokens that end a row; None for those of a loaded model, else none.
      cache: a cache to continue in; its rows keep their tokens and the prompts come behind them.
        None allocates one of the size needed, rounded up, in the model's dtype.
      split: which part of the work the host does: `"host"`, `"device"`, `"model"` (both end
        together by a cost model), `"adaptive"` (the same, corrected by the times of every layer),
        either with `:FILE` of `fluxion bench machine`, or a share; None for the host.
      execution: how a step runs.
      seed: of the sampling.
      chunk_tokens: tokens that one compiled call prefills; shorter prompts are padded to it.
      progress: show progress bars; None shows them on a terminal and in a notebook.

    Returns:
      The tokens, their log-probabilities, statistics and the cache.

    Raises:
      ConfigError: an argument is out of range, a prompt is empty or has unknown token ids.
      UnsupportedError: an implementation named in `execution` cannot be used here.
      CacheFullError: prompt and new tokens together do not fit into the cache.
      FluxionError: a step failed; `cache` holds everything up to the last good step, and goes on
        after `cache.clear_status()`. Or such an error was pending when this was called.
      KeyboardInterrupt: on Ctrl-C, once the step that was running has stopped; `cache` holds
        everything up to the last good step. An error that comes while decoding, and this one, have
        an attribute `partial`: the `Result` so far.

    Example:
      >>> import fluxion_jax as fx
      >>> from fluxion_jax.models import Decoder, ModelConfig
      >>> model = Decoder.random(ModelConfig.tiny_llama())
      >>> prompt = list(range(100))

      >>> result = fx.generate(model, prompt, policy="fixed:16:0.05", max_new_tokens=4)
      >>> len(result.tokens[0]), result.stats.num_steps
      (4, 4)
    """
    session = Session(
        model,
        prompts,
        policy=policy,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_tokens=stop_tokens,
        cache=cache,
        split=split,
        execution=execution,
        seed=seed,
        chunk_tokens=chunk_tokens,
        progress=progress,
    )
    chunks: list[Steps] = []
    try:
        chunks.extend(session.run())
    except (FluxionError, KeyboardInterrupt) as error:
        # What came before is in the cache, so it must not be lost to the caller.
        error.partial = _result(session, chunks)  # type: ignore[union-attr]
        raise
    return _result(session, chunks)


def _result(session: Session, chunks: Sequence[Steps]) -> Result:
    rows = range(session.cache.batch)
    kept = [[c.tokens[row][c.tokens[row] != NO_TOKEN] for c in chunks] for row in rows]
    log_probs = [[c.log_probs[row][c.tokens[row] != NO_TOKEN] for c in chunks] for row in rows]
    return Result(
        [np.concatenate([np.zeros(0, np.int32), *row]) for row in kept],
        [np.concatenate([np.zeros(0, np.float32), *row]) for row in log_probs],
        session.stats,
        session.cache,
        _plans(session, chunks) if session.execution.record and chunks else None,
    )


def _plans(session: Session, chunks: Sequence[Steps]) -> ReplayPolicy | None:
    recorded = [
        np.concatenate([getattr(c, name)[:, : int(c.num_steps)] for c in chunks], axis=1)
        for name in ("granularity", "budget_tokens")
    ]
    return recorded_plans(session.cache.layout, session.first_positions, *recorded)


def stream(
    model: Any,
    prompts: Prompts,
    *,
    policy: str | Policy | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    stop_tokens: Sequence[int] | None = None,
    cache: HostKV | None = None,
    split: str | float | Split | None = None,
    execution: Execution | None = None,
    seed: int = 0,
    chunk_tokens: int = CHUNK_TOKENS,
    progress: bool | None = False,
) -> Iterator[Step]:
    """Generates like `generate`, but gives each step by itself; they arrive in compiled chunks.

    Args:
      model: see `generate`.
      prompts: see `generate`.
      policy: see `generate`.
      max_new_tokens: see `generate`.
      sampling: see `generate`.
      stop_tokens: see `generate`.
      cache: see `generate`; it advances by whole compiled chunks of up to 32 steps, so between
        two steps it may already hold tokens that come later.
      split: see `generate`.
      execution: see `generate`.
      seed: see `generate`.
      chunk_tokens: see `generate`.
      progress: see `generate`; off by default, because what is streamed is usually printed.

    Returns:
      An iterator of one `Step` per decode step. The prompt is read when the first is asked for.

    Raises:
      ConfigError, UnsupportedError, CacheFullError: see `generate`; at the call.
      FluxionError, KeyboardInterrupt: while the steps are taken, after the last good one; the
        cache is as `generate` leaves it then, and there is no `partial`.

    Example:
      >>> import fluxion_jax as fx
      >>> from fluxion_jax.models import Decoder, ModelConfig
      >>> model = Decoder.random(ModelConfig.tiny_llama())
      >>> prompt = list(range(100))

      >>> [step.tokens.shape for step in fx.stream(model, prompt, max_new_tokens=4)]
      [(1,), (1,), (1,), (1,)]
    """
    session = Session(
        model,
        prompts,
        policy=policy,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_tokens=stop_tokens,
        cache=cache,
        split=split,
        execution=execution,
        seed=seed,
        chunk_tokens=chunk_tokens,
        progress=progress,
    )
    return _steps(session)


def _steps(session: Session) -> Iterator[Step]:
    for chunk in session.run():
        for i in range(int(chunk.num_steps)):
            yield Step(np.asarray(chunk.tokens[:, i]), np.asarray(chunk.log_probs[:, i]))


@dataclasses.dataclass
class Scores:
    """What `score` returns, per scored token.

    Attributes:
      log_probs: float32 `[B, S]`, natural log of the probability of each given token.
      likeliest: int32 `[B, S]`, the model's most likely token in its place.
      stats: counts and times.
      distributions: float32 `[B, S, V]`, log-probabilities of all tokens; None unless measured.

    Example:
      >>> import fluxion_jax as fx
      >>> from fluxion_jax.models import Decoder, ModelConfig
      >>> model = Decoder.random(ModelConfig.tiny_llama())
      >>> prompt = list(range(100))
      >>> cache = fx.HostKV.allocate(model.config.kv_layout("float32"), batch=1, max_tokens=512)
      >>> logits = fx.prefill(model, prompt, cache)

      >>> scores = fx.score(model, cache, [[5, 6, 7, 8]])
      >>> scores.likeliest.shape, scores.perplexity > 1
      ((1, 3), True)
    """

    log_probs: np.ndarray
    likeliest: np.ndarray
    stats: DecodeStats
    distributions: np.ndarray | None = None

    def __str__(self) -> str:
        rows, tokens = self.log_probs.shape
        return (
            f"Scores of {tokens} tokens in {rows} rows, perplexity {self.perplexity:.4g}\n"
            f"{self.stats}"
        )

    @property
    def perplexity(self) -> float:
        """The exponential of the mean negative log-probability, over rows that took part."""
        return float(np.exp(-self.log_probs[self.likeliest != NO_TOKEN].mean()))


def score(
    model: Any,
    cache: HostKV,
    tokens: np.ndarray | Sequence[Sequence[int]],
    *,
    policy: str | Policy = "full",
    split: str | float | Split | None = None,
    execution: Execution | None = None,
    progress: bool | None = None,
) -> Scores:
    """Teacher-forces a continuation through real decode steps under a policy.

    Args:
      model: see `generate`.
      cache: the prefilled cache; it advances. Fork it to compare policies on the same state.
      tokens: int `[B, S + 1]`; the first is fed, the other `S` are scored.
      policy: what each head may read.
      split: see `generate`.
      execution: see `generate`; with `measure=True` the stats have recall and output error, and
        the result has the whole distributions.
      progress: see `generate`.

    Returns:
      `Scores` of the `S` tokens.

    Raises:
      ConfigError: the shape does not fit the cache or ids are unknown.
      CacheFullError: the continuation does not fit.

    Example:
      >>> import fluxion_jax as fx
      >>> from fluxion_jax.models import Decoder, ModelConfig
      >>> model = Decoder.random(ModelConfig.tiny_llama())
      >>> prompt = list(range(100))
      >>> cache = fx.HostKV.allocate(model.config.kv_layout("float32"), batch=1, max_tokens=512)
      >>> logits = fx.prefill(model, prompt, cache)

      >>> scores = fx.score(model, cache, [[5, 6, 7, 8]], policy="fixed:16:0.05")
      >>> scores.log_probs.shape
      (1, 3)
    """
    tokens = check_scored(tokens, cache, unwrap(model))
    session = Session(
        model,
        tokens[:, :1],
        policy=policy,
        max_new_tokens=tokens.shape[1] - 1,
        sampling=None,
        stop_tokens=(),
        cache=cache,
        split=split,
        execution=execution,
        seed=0,
        chunk_tokens=CHUNK_TOKENS,
        progress=progress,
        forced=tokens[:, 1:],
    )
    chunks = list(session.run())

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(c, name)[:, : int(c.num_steps)] for c in chunks], axis=1)

    distributions = joined("distributions")
    return Scores(
        joined("log_probs"),
        joined("likeliest"),
        session.stats,
        distributions if distributions.shape[-1] else None,
    )


def prefill(
    model: Any,
    prompts: Prompts,
    cache: HostKV,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    progress: bool | None = None,
) -> np.ndarray:
    """Reads prompts into a cache with full attention; the cache object is updated.

    Args:
      model: see `generate`.
      prompts: one list of token ids, or one per row.
      cache: the cache; rows keep what they have.
      chunk_tokens: see `generate`.
      progress: see `generate`.

    Returns:
      float32 `[B, V]`, the logits behind each row's last token.

    Raises:
      ConfigError, CacheFullError, FluxionError, KeyboardInterrupt: see `generate`.

    Example:
      >>> import fluxion_jax as fx
      >>> from fluxion_jax.models import Decoder, ModelConfig
      >>> model = Decoder.random(ModelConfig.tiny_llama())
      >>> prompt = list(range(100))
      >>> cache = fx.HostKV.allocate(model.config.kv_layout("float32"), batch=1, max_tokens=512)
      >>> logits = fx.prefill(model, prompt, cache)

      >>> logits.shape, cache.lengths.tolist()
      ((1, 256), [100])
    """
    model = unwrap(model)
    rows = check_prompts(prompts, model)
    require_integer("chunk_tokens", chunk_tokens)
    check_cache(cache, model, np.asarray([len(row) for row in rows]))
    with cancel_word() as word:
        return read_prompts(model, rows, cache, word, chunk_tokens, progress, Execution())
