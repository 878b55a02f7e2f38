"""One generation: prefill, then chunks of decode steps, on the caller's cache.

Prefill reads all but the last token of a prompt; the last one is the first that is decoded, so that
every new token is produced under the policy. The caller's cache object always holds the last good
buffers: after each compiled chunk, after an error, after Ctrl-C.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

import host_ops
from fluxion_jax.arguments import (
    Prompts,
    check_cache,
    check_prompts,
    check_recorded,
    stop_slots,
)
from fluxion_jax.attention import Execution
from fluxion_jax.cache.host_kv import HostKV
from fluxion_jax.cache.rebuild import rebuild_summaries
from fluxion_jax.compilations import compilations
from fluxion_jax.decode import NO_TOKEN, Steps, decode_chunk, prefill_chunk
from fluxion_jax.errors import ConfigError, FluxionError, refused_by_name, require, require_integer
from fluxion_jax.interrupt import Held, cancel_word, interrupt_held, wait
from fluxion_jax.policy.fixed_policy import full
from fluxion_jax.policy.parse import parse_policy
from fluxion_jax.policy.protocol import Policy, needs_sketch
from fluxion_jax.policy.split import Split, parse_split
from fluxion_jax.progress import bar_options
from fluxion_jax.sampling import Sampling, greedy
from fluxion_jax.stats import DecodeStats

# One compiled call decodes so many tokens: few enough for a lively stream and a prompt Ctrl-C.
CHUNK_STEPS = 32
# One compiled call prefills so many tokens: enough to keep the matrix units of a CPU busy, and not
# too many for a short question behind a long text. A GPU wants 1,024 or more.
CHUNK_TOKENS = 256
# A cache made here holds a multiple of this, so that prompts of similar length share a program.
_CAPACITY_TOKENS = 128


class Session:
    """One generation: validated arguments, then `run`."""

    def __init__(
        self,
        model: Any,
        prompts: Prompts,
        *,
        policy: str | Policy | None,
        max_new_tokens: int,
        sampling: Sampling | None,
        stop_tokens: Sequence[int] | None,
        cache: HostKV | None,
        split: str | float | Split | None,
        execution: Execution | None,
        seed: int,
        chunk_tokens: int,
        progress: bool | None,
        forced: np.ndarray | None = None,
    ) -> None:
        require_integer("max_new_tokens", max_new_tokens)
        require_integer("chunk_tokens", chunk_tokens)
        self.model = unwrap(model)
        for name, value, kind, remedy in (
            ("sampling", sampling, Sampling, "make one with greedy() or top_p()"),
            ("execution", execution, Execution, "make one with Execution(...)"),
            ("cache", cache, HostKV, "allocate one, or leave it out"),
        ):
            if value is not None:
                require(name, value, kind, remedy)
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
            raise ConfigError(f"expected an integer seed, got {seed!r}; 0 is the default")
        if not -(2**63) <= seed < 2**63:
            raise ConfigError(f"expected a seed that 64 bits hold, got {seed}; 0 is the default")
        self.rows = check_prompts(prompts, self.model)
        self.forced = forced
        self.policy = _default(model, cache) if policy is None else parse_policy(policy, model)
        self.split = parse_split(split)
        self.sampling = sampling or greedy()
        if stop_tokens is None:
            stop_tokens = getattr(getattr(model, "tokenizer", None), "eos_ids", ())
        self.stop_tokens = stop_slots(stop_tokens)
        self.max_new_tokens = max_new_tokens
        self.execution = execution or Execution()
        self.seed = seed
        self.chunk_tokens = chunk_tokens
        self.progress = progress
        fed = np.asarray([len(row) for row in self.rows]) + max_new_tokens - 1
        if cache is None:
            # A model of one's own need not know of sketches until a policy wants one.
            options = {"sketch": True} if needs_sketch(self.policy) else {}
            layout = self.model.config.kv_layout(cache_dtype(self.model), **options)
            capacity = -(-int(fed.max()) // _CAPACITY_TOKENS) * _CAPACITY_TOKENS
            cache = HostKV.allocate(layout, len(self.rows), capacity)
        check_cache(cache, self.model, fed)
        if self.execution.record:
            check_recorded(cache, self.policy)
        self.cache = cache
        self.first_positions = np.asarray(cache.lengths)
        with refused_by_name():
            host = host_ops.chosen(self.execution.host)
        self.stats = DecodeStats(layout=cache.layout, host=host)

    def run(self) -> Iterator[Steps]:
        """Prefills and decodes; yields each chunk of steps once its cache is stored."""
        with cancel_word() as word:
            prompts = [row[:-1] for row in self.rows]
            self.stats.prompt_tokens = sum(map(len, self.rows))
            start = time.perf_counter()
            if any(prompts):
                read_prompts(
                    self.model,
                    prompts,
                    self.cache,
                    word,
                    self.chunk_tokens,
                    self.progress,
                    self.execution,
                )
            self.first_positions = np.asarray(self.cache.lengths)
            self.stats.prefill_s = time.perf_counter() - start
            try:
                yield from self._decode(word)
            finally:
                # The word goes back now; in the cache it would name somebody else's.
                self.cache.cancel = jnp.zeros((1,), jnp.int32)

    def _decode(self, word: int) -> Iterator[Steps]:
        graph, params = nnx.split(self.model)
        key = jax.random.key(self.seed)
        tokens = jnp.asarray([row[-1] for row in self.rows], jnp.int32)
        finished = jnp.zeros(len(self.rows), bool)
        left, done = self.max_new_tokens, 0
        lengths = self.cache.lengths
        with tqdm(total=left, desc="decode", unit="token", **bar_options(self.progress)) as bar:
            while left:
                if self.cache.lengths is not lengths:
                    raise FluxionError(
                        "expected the cache as this generation left it, got one that was used "
                        "meanwhile; give every generation its own: cache.fork()"
                    )
                start, programs = time.perf_counter(), compilations()
                asked = min(left, CHUNK_STEPS)
                self.cache.cancel = jnp.full((1,), word, jnp.int32)
                forced = self._forced_chunk(done)
                with interrupt_held(word) as held:
                    cache, steps = decode_chunk(
                        graph,
                        params,
                        self.cache,
                        tokens,
                        finished,
                        forced,
                        jnp.asarray(asked, jnp.int32),
                        jnp.asarray(self.stop_tokens),
                        key,
                        self.policy,
                        self.split,
                        self.sampling,
                        self.execution,
                    )
                    # Dispatch is asynchronous: a call that compiles takes as long as compiling.
                    if compilations() > programs:
                        self.stats.compile_s += time.perf_counter() - start
                    _finish(self.cache, cache, steps, held)
                    chunk = jax.tree.map(np.asarray, steps)
                    num_steps = int(chunk.num_steps)
                    self._count(chunk, time.perf_counter() - start)
                    bar.update(num_steps)
                    lengths = self.cache.lengths
                # The steps before a failing one, or before Ctrl-C, are in the cache, so the caller
                # must see them first.
                if num_steps:
                    yield chunk
                held.pass_on()
                self.cache.check()
                tokens, finished = steps.next_tokens, steps.finished
                left, done = left - num_steps, done + num_steps
                # Fewer steps than asked for: every row that takes part has finished.
                if num_steps < asked or chunk.finished.all():
                    return

    def _forced_chunk(self, done: int) -> jax.Array:
        forced = np.full((len(self.rows), CHUNK_STEPS), NO_TOKEN, np.int32)
        if self.forced is not None:
            part = self.forced[:, done : done + CHUNK_STEPS]
            forced[:, : part.shape[1]] = part
        return jnp.asarray(forced)

    def _count(self, chunk: Steps, elapsed_s: float) -> None:
        self.stats.decode_s += elapsed_s
        self.stats.num_tokens += int((chunk.tokens != NO_TOKEN).sum())
        self.stats.add(chunk.totals, int(chunk.num_steps))


def read_prompts(
    model: Any,
    rows: list[list[int]],
    cache: HostKV,
    word: int,
    chunk: int,
    progress: bool | None,
    execution: Execution,
) -> np.ndarray:
    """Prefills checked prompts in chunks; returns float32 `[B, V]`, the logits behind each row."""
    graph, params = nnx.split(model)
    lengths = np.asarray([len(row) for row in rows])
    longest = int(lengths.max())
    tokens = np.zeros((len(rows), -(-longest // chunk) * chunk), np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids
    last = np.zeros((len(rows), 0), np.float32)
    with tqdm(total=longest, desc="prefill", unit="token", **bar_options(progress)) as bar:
        for first in range(0, longest, chunk):
            count = np.clip(lengths - first, 0, chunk)
            part = jnp.asarray(tokens[:, first : first + chunk])
            with interrupt_held(word) as held:
                new, logits = prefill_chunk(
                    graph, params, cache, part, jnp.asarray(count, jnp.int32), execution
                )
                _finish(cache, new, logits, held)
                if int(new.status[0]):
                    cache.adopt(rebuild_summaries(cache, execution.host))
            held.pass_on()
            behind = np.asarray(logits)
            last = np.where((count > 0)[:, None], behind, last if last.size else behind)
            bar.update(min(chunk, longest - first))
            cache.check()
    return last


def _finish(cache: HostKV, new: HostKV, outputs: Any, held: Held) -> None:
    """Stores a program's cache in the caller's object, then waits for it."""
    cache.adopt(new)
    wait((new.lengths, new.status, outputs))
    if held:
        # The caller goes on with the cache; that it was told to stop is not an error of it.
        cache.status = cache.status & ~host_ops.STATUS_CANCELLED


def unwrap(model: Any) -> Any:
    """The NNX module of a loaded model; a module is one itself, whatever its attributes.

    Raises:
      ConfigError: it is none.
    """
    module = model if isinstance(model, nnx.Module) else getattr(model, "model", model)
    if not isinstance(module, nnx.Module) or not hasattr(module, "decode_step"):
        raise ConfigError(
            "expected a loaded model, or an NNX module with prefill_chunk and decode_step, got "
            f"{type(model).__name__}; load one with load_model, or adapt yours with adapters.adapt"
        )
    if not hasattr(getattr(module, "config", None), "vocab_size"):
        raise ConfigError(
            f"expected a model with a config that has vocab_size, got {type(module).__name__} "
            "without one; give it a models.ModelConfig, or adapt it with adapters.adapt"
        )
    return module


def _default(model: Any, cache: HostKV | None) -> Policy:
    """What a model without a policy's name gets; a cache says whether it can be looked at."""
    # Only needed here, and slow to import.
    from fluxion_jax.calibration.storage import default_policy

    policy = default_policy(model)
    seen = cache is None or bool(cache.sketch) or not cache.num_host_blocks
    return policy if seen or not needs_sketch(policy) else full()


def cache_dtype(model: Any) -> str:
    """The cache keeps what the model computes in: float32 or bfloat16."""
    dtypes = {x.dtype.name for x in jax.tree.leaves(nnx.state(model, nnx.Param))}
    return "bfloat16" if "bfloat16" in dtypes else "float32"
