"""Run by test_sharded.py in a process with eight CPU devices; prints its findings as JSON."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

import jax
import numpy as np

import fluxion_jax as fx
from fluxion_jax.compilations import compilations
from fluxion_jax.decode import decode_chunk, prefill_chunk
from fluxion_jax.models import Decoder, ModelConfig
from tests.sharding import steps


def mesh(size: int) -> jax.sharding.Mesh:
    return jax.make_mesh((size,), ("heads",), devices=jax.devices()[:size])


def error(call) -> str:
    try:
        call()
    except fx.FluxionError as problem:
        return f"{type(problem).__name__}: {problem}"
    return "no error"


def places(cache: fx.HostKV) -> dict[str, object]:
    return {
        "devices": len({shard.device for shard in cache.k[0].addressable_shards}),
        "heads": cache.k[0].addressable_shards[0].data.shape[1],
        "kind": cache.k[0].sharding.memory_kind,
    }


def generation() -> dict[str, object]:
    """The whole of `generate`, unchanged, on four devices of a mesh with another axis."""
    config = dataclasses.replace(
        ModelConfig.tiny_gemma3(), num_layers=2, sliding_layers=(0,), num_kv_heads=4, num_heads=8
    )
    model = Decoder.random(config)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, n).tolist() for n in (380, 30)]
    counters = prefill_chunk.compilations, decode_chunk.compilations, compilations

    def generate(where: jax.sharding.Mesh | None) -> tuple[fx.Result, list[int]]:
        """What comes out, and what was compiled for it: prefill, decoding, and all programs."""
        axis = None if where is None else "heads"
        cache = fx.HostKV.allocate(config.kv_layout("float32"), 2, 420, mesh=where, axis=axis)
        before = [count() for count in counters]
        result = fx.generate(
            model,
            prompts,
            policy="fixed:16:0.1",
            cache=cache,
            max_new_tokens=33,
            split="host",
            execution=fx.Execution(dense_below_tokens=0),
            chunk_tokens=128,
            progress=False,
        )
        cache.check()
        return result, [count() - n for count, n in zip(counters, before, strict=True)]

    where = jax.make_mesh((2, 4), ("data", "heads"))
    (one, _), (many, first), (_, again) = (generate(x) for x in (None, where, where))
    return {
        "same_tokens": all(map(np.array_equal, one.tokens, many.tokens)),
        "log_probs": max(
            float(np.abs(a - b).max()) for a, b in zip(one.log_probs, many.log_probs, strict=True)
        ),
        "compilations": [first, again],
    }


def main() -> None:
    found: dict[str, object] = {"sizes": {}}
    one, _ = steps.run_global(None)
    for size in (1, 2, 4, 8):
        seen, cache = steps.run_global(mesh(size))
        found["sizes"][size] = places(cache) | {
            "out": float(np.abs(seen["out"] - one["out"]).max()),
            "same_selection": bool(np.array_equal(seen["selection"], one["selection"])),
        }
    expected, _ = steps.run(None)
    seen, cache = steps.run(mesh(4))
    found["everything"] = steps.differences(seen, expected)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        cache.save(path)
        moved = [fx.HostKV.load(path), fx.HostKV.load(path, mesh=mesh(2)), cache.fork([1, 0, 1])]
        found["moved"] = [places(x) for x in moved]
        same = [
            np.array_equal(np.array(x.window_k[0]), np.array(cache.window_k[0]))
            and np.array_equal(np.array(x.k[0])[:, :, :4], np.array(cache.k[0])[:, :, :4])
            for x in moved[:2]
        ]
        found["same"] = same
        found["forked"] = bool(
            np.array_equal(np.array(moved[2].k[0]), np.array(cache.k[0])[[1, 0, 1]])
        )
    for x in moved:
        x.check()
    found["lengths"] = np.asarray(cache.reset([0]).lengths).tolist()
    layout = steps.layout()
    found["errors"] = [
        error(lambda: fx.HostKV.allocate(layout, 1, 64, mesh=mesh(3))),
        error(lambda: fx.HostKV.allocate(layout, 1, 64, mesh=mesh(2), axis="layers")),
        error(lambda: fx.HostKV.allocate(layout, 1, 64, axis="heads")),
        error(lambda: steps.measured(cache)),
        error(lambda: steps.copied(cache)),
    ]
    found["generation"] = generation()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
