"""`fluxion bench prefill`: a long prompt read into host memory, against all on the device."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fluxion_jax.attention import Execution
from fluxion_jax.bench.cells import cell
from fluxion_jax.bench.random_arrays import random_array
from fluxion_jax.bench.stamp import stamp
from fluxion_jax.bench.statistics import summarise
from fluxion_jax.bench.step_programs import LLAMA_8B, Weights, random_cache, random_weights
from fluxion_jax.cache.layout import BLOCK_TOKENS
from fluxion_jax.chunk_attention import TILE_BLOCKS, attend
from fluxion_jax.decode import prefill_chunk
from fluxion_jax.models.config import ModelConfig
from fluxion_jax.state import merge

PLACES = ("host", "device")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      config: sizes of the model.
      context_tokens: of the whole prompt.
      chunk_tokens: that one call reads.
      positions: how many places in the prompt are measured, evenly spread, both ends included.
      calls: timed calls at each of them.
    """

    config: ModelConfig = LLAMA_8B
    context_tokens: int = 131072
    chunk_tokens: int = 2048
    positions: int = 5
    calls: int = 5


QUICK = Settings(positions=3, calls=2)


def run(
    settings: Settings = Settings(),
    folder: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Times chunks of a prompt, behind as many tokens as they would have before them.

    Args:
      settings: what is measured.
      folder: where finished cells are kept and looked for; None keeps nothing.
      say: told in one line what is measured next.
    """
    last = settings.context_tokens - settings.chunk_tokens
    starts = np.linspace(0, last, settings.positions).astype(int) // BLOCK_TOKENS * BLOCK_TOKENS
    weights: list[Weights] = []
    rows = []
    for place in PLACES:

        def measure(place: str = place) -> dict[str, Any]:
            say(f"prefill of {settings.context_tokens} tokens, KV on the {place}")
            if not weights:
                weights.append(random_weights(settings.config))
            program = _host_program if place == "host" else _device_program
            call = program(weights[0], settings)
            return {"place": place, "chunk_s": [_times(call, int(s), settings) for s in starts]}

        size = f"{settings.context_tokens}-{settings.chunk_tokens}"
        rows.append(cell(folder, f"prefill-{size}-{place}", measure))
    for row in rows:
        medians = [chunk["median"] for chunk in row["chunk_s"]]
        row["total_s"] = float(np.mean(np.interp(np.arange(0, last + 1), starts, medians))) * (
            settings.context_tokens / settings.chunk_tokens
        )
    return {
        "benchmark": "prefill",
        "stamp": stamp(),
        "settings": {**dataclasses.asdict(settings), "starts": starts.tolist()},
        "rows": rows,
        "over_device": rows[0]["total_s"] / rows[1]["total_s"],
    }


def _times(call: Callable[[int], Any], start: int, settings: Settings) -> dict[str, Any]:
    jax.block_until_ready(call(start))
    seconds = []
    for _ in range(settings.calls):
        begin = time.perf_counter()
        jax.block_until_ready(call(start))
        seconds.append(time.perf_counter() - begin)
    return summarise(seconds)


def _host_program(weights: Weights, settings: Settings) -> Callable[[int], Any]:
    """A chunk as `generate` reads it."""
    held = [random_cache(weights.config, (settings.context_tokens,), "host")]
    tokens = jnp.zeros((1, settings.chunk_tokens), jnp.int32)
    count = jnp.full((1,), settings.chunk_tokens, jnp.int32)

    def call(start: int) -> Any:
        cache = held[0].replace(lengths=jnp.full((1,), start, jnp.int32))
        held[0], logits = prefill_chunk(
            weights.graph, weights.params, cache, tokens, count, Execution()
        )
        jax.block_until_ready(held[0].lengths)
        held[0].check()
        return logits

    return call


def _device_program(weights: Weights, settings: Settings) -> Callable[[int], Any]:
    """The same with keys and values in device memory: same tiles, same attention."""
    config = weights.config
    shape = (1, config.num_kv_heads, settings.context_tokens, config.head_dim)
    held = [
        tuple(
            random_array(shape, jnp.bfloat16, "device", 2 * layer + part)
            for layer in range(config.num_layers)
        )
        for part in (0, 1)
    ]
    tokens = jnp.zeros((1, settings.chunk_tokens), jnp.int32)
    program = jax.jit(_resident_chunk, static_argnums=0, donate_argnums=(3, 4))

    def call(start: int) -> Any:
        held[0], held[1], logits = program(
            weights.graph, weights.params, tokens, held[0], held[1], jnp.asarray(start, jnp.int32)
        )
        return logits

    return call


def _resident_chunk(
    graph: Any, params: Any, tokens: jax.Array, k: Any, v: Any, start: jax.Array
) -> tuple[Any, Any, jax.Array]:
    model = nnx.merge(graph, params)
    x = model._embed(tokens)
    step = jnp.arange(tokens.shape[1])
    causal = (step[None, :] <= step[:, None])[None]
    new_k: list[jax.Array] = []
    new_v: list[jax.Array] = []
    for layer, layer_k, layer_v in zip(model.layers, k, v, strict=True):
        attention = layer.attention
        q, *kv = attention._project(layer.attention_norm(x), (start + step)[None])
        chunk = [jnp.swapaxes(y, 1, 2).astype(layer_k.dtype) for y in kv]
        state = attend(q, chunk[0], chunk[1], causal, attention.scale)
        state = _attend_resident(q, layer_k, layer_v, start, attention.scale, state)
        x = layer.finish(x, attention.o(state[0].astype(x.dtype).reshape(*x.shape[:2], -1)))
        for held, old, new in zip((new_k, new_v), (layer_k, layer_v), chunk, strict=True):
            held.append(jax.lax.dynamic_update_slice_in_dim(old, new, start, 2))
    return tuple(new_k), tuple(new_v), model._logits(x[:, -1:])[:, 0]


def _attend_resident(
    q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, scale: float, state: Any
) -> Any:
    """Adds the tokens before the chunk to its attention state, tile by tile."""
    tile = min(TILE_BLOCKS * BLOCK_TOKENS, k.shape[2])

    def body(i: jax.Array, state: Any) -> Any:
        wanted = i * tile
        first = jnp.minimum(wanted, k.shape[2] - tile)
        tile_k, tile_v = (jax.lax.dynamic_slice_in_dim(x, first, tile, 2) for x in (k, v))
        place = first + jnp.arange(tile)
        mask = jnp.broadcast_to((place >= wanted) & (place < start), (1, q.shape[1], tile))
        return merge(state, attend(q, tile_k, tile_v, mask, scale))

    return jax.lax.fori_loop(0, -(-start // tile), body, state)


def render(report: dict[str, Any]) -> str:
    """The report as a table for a terminal."""
    settings = report["settings"]
    starts = "".join(f"{s:>10}" for s in settings["starts"])
    lines = [
        f"ms of a chunk of {settings['chunk_tokens']} tokens behind  {starts}   whole prompt, s"
    ]
    for row in report["rows"]:
        chunks = "".join(f"{1e3 * c['median']:10.1f}" for c in row["chunk_s"])
        lines.append(f"KV on the {row['place']:29s} {chunks}   {row['total_s']:10.2f}")
    lines.append(f"host over device: {report['over_device']:.2f}")
    return "\n".join(lines)
