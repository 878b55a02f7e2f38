"""The planner's bytes are those that are allocated; its times are arithmetic, and say so."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import pytest
from flax import nnx

import fluxion_jax as fx
from fluxion_jax.cli import main
from fluxion_jax.models import Decoder, ModelConfig
from fluxion_jax.planning import SHAPES, Machine, plan
from fluxion_jax.policy import CostModel
from tests.goldens import load as goldens

MACHINE = Machine("a machine", 1e9, 1e10, 1e-3)


@pytest.mark.parametrize("summaries", ["host", "device"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("config", "tokens", "batch"),
    [
        (ModelConfig.tiny_llama(), 1000, 3),
        (ModelConfig.tiny_llama(), 200, 1),
        (ModelConfig.tiny_gemma3(), 2500, 2),
    ],
)
def test_bytes_are_those_that_are_allocated(
    config: ModelConfig, tokens: int, batch: int, dtype: str, summaries: Any
) -> None:
    memory = plan(
        config, context_tokens=tokens, batch=batch, dtype=dtype, summaries=summaries
    ).memory
    cache = fx.HostKV.allocate(config.kv_layout(dtype, summaries), batch, tokens)
    assert memory.host_bytes == cache.host_bytes
    assert memory.device_cache_bytes == pytest.approx(cache.device_bytes, rel=0.02)
    model = nnx.eval_shape(lambda: Decoder.random(config, dtype=dtype))
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.state(model)))
    assert memory.device_weight_bytes == pytest.approx(weights, rel=0.02)


def test_a_prediction_is_arithmetic() -> None:
    config = dataclasses.replace(ModelConfig.tiny_llama(), num_layers=2)
    found = plan(config, context_tokens=3520, batch=2, policy="fixed:16:0.05", machine=MACHINE)
    # 3,520 - 320 tokens are 200 blocks on the host; 5 % of 3,520 are 11 units, of 6 / 2 heads.
    block, summary = 2 * 16 * 64 * 2, 2 * 64
    same = 2 * 2 * 2 * (11 * block + 200 * summary)
    apart = 2 * 2 * 2 * (33 * block + 200 * summary)
    assert found.read_bytes == (same, apart)
    dense_s = found.memory.device_weight_bytes / 1e10
    assert found.step_s == pytest.approx([dense_s + 2e-3 + n / 1e9 for n in (same, apart)])
    full = plan(config, context_tokens=3520, batch=2, policy="full", machine=MACHINE)
    assert full.read_bytes == (2 * 2 * 2 * 200 * block,) * 2


def test_an_8b_model_at_128k() -> None:
    found = plan("8b", context_tokens=131_072, batch=1)
    assert found.memory.host_kv_bytes == pytest.approx(16 * 2**30, rel=0.01)
    assert found.memory.device_weight_bytes == pytest.approx(16.06e9, rel=0.01)
    assert "predicted" in str(found)
    assert "not measured" in str(found)


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = goldens.HERE / "tiny_qwen2"
    assert (
        main(["plan", "--model", str(folder), "--context", "4000", "--batch", "2", "--json"]) == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert report["batch"] == 2
    assert report["memory"]["host_kv_bytes"] > 0
    assert main(["plan", "--model", "8b", "--context", "8192", "--output", str(tmp_path)]) == 0
    assert "keys and values" in capsys.readouterr().out
    assert json.loads((tmp_path / "plan.json").read_text())["model"] == "8b"
    assert set(SHAPES) == {"8b", "70b", "qwen3-8b", "mistral-7b"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "9b", "--context", "8"], 2, "expected a GGUF file, a model directory"),
        (["--model", "8b", "--context", "0"], 2, "expected context_tokens >= 1"),
        (["--model", "8b", "--context", "8", "--policy", "half"], 2, "got 'half'"),
        (
            ["--model", "8b", "--context", "8", "--machine", "abacus"],
            2,
            "expected a machine's JSON",
        ),
        (["--model", "8b", "--context", "8", "--machine", __file__], 1, "expected the numbers"),
    ],
)
def test_bad_input(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == code
    assert message in capsys.readouterr().err


def test_the_planner_and_the_split_assume_the_same_host() -> None:
    """Both predict with the constants of one machine, so that neither drifts from the other."""
    assert Machine.load().host_bytes_per_s == CostModel().host_bytes_per_s
