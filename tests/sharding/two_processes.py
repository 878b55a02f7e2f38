"""Run twice by test_sharded.py, as the two processes of one machine; prints findings as JSON."""

from __future__ import annotations

import json
import sys

import jax
import numpy as np

import fluxion_jax as fx
from tests.sharding import steps


def main(address: str, rank: int, expected: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=rank)
    seen, cache = steps.run_global(jax.make_mesh((4,), ("heads",)))
    found: dict[str, object] = {
        "rank": jax.process_index(),
        "devices": jax.device_count(),
        "local": len(cache.k[0].addressable_shards),
    }
    for name, call in (("fork", cache.fork), ("save", lambda: cache.save("never"))):
        try:
            call()
        except fx.FluxionError as problem:
            found[name] = f"{type(problem).__name__}: {problem}"
    with np.load(expected) as one:
        found["out"] = float(np.abs(seen["out"] - one["out"]).max())
        found["same_selection"] = bool(np.array_equal(seen["selection"], one["selection"]))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
