"""Five thousand steps: memory does not grow, and the cache stays where it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
STEPS = 5000
WARM_UP_STEPS = 512

PROGRAM = f"""
import dataclasses, json, os
import fluxion_jax as fx
from fluxion_jax.models.config import ModelConfig
from fluxion_jax.models.decoder import Decoder

def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

model = Decoder.random(dataclasses.replace(ModelConfig.tiny_llama(), num_layers=1), 0)
cache = fx.HostKV.allocate(model.config.kv_layout("float32"), 1, 200 + {STEPS})
pointers, resident = set(), []
for step, _ in enumerate(
    fx.stream(
        model, list(range(200)), cache=cache, policy="fixed:16:0.05", max_new_tokens={STEPS}
    )
):
    if step % 32 == 31:
        pointers.add(
            tuple(x[0].unsafe_buffer_pointer() for x in (cache.k, cache.v, cache.summaries))
        )
    if step >= {WARM_UP_STEPS} and step % 32 == 31:
        resident.append(resident_bytes())
print(json.dumps({{
    "growth_bytes": max(resident) - resident[0],
    "places": len(pointers),
    "tokens": int(cache.lengths[0]),
}}))
"""


@pytest.mark.slow
def test_five_thousand_steps():
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert report["tokens"] == 200 + STEPS - 1
    assert report["places"] == 1
    assert report["growth_bytes"] < 10e6
