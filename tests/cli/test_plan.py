"""The planner's bytes are those that are allocated; its times are arithmetic, and say so."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import jax
import pytest
from flax import nnx

import fluxion_jax as fx
from fluxion_jax.bench.machine import _cost_model
from fluxion_jax.cli import main
from fluxion_jax.models import Decoder, ModelConfig
from fluxion_jax.planning import DEFAULT_LAYER_S, SHAPES, Machine, plan
from fluxion_jax.policy import CostModel
from tests.goldens import load as goldens

COST = CostModel(1e9, 5e8, 1e-3, 2e-3)
MACHINE = Machine("a machine", COST, 1e10, 1e-4)
# Of one H100, its machine and its decode steps, as they were written there.
RECORDED = Path(__file__).parent / "recorded"
REPORT = RECORDED / "bench-machine-h100.json"
STEPS = [
    row
    for row in json.loads((RECORDED / "bench-step-h100.json").read_text())["rows"]
    if row["kind"] == "sparse"
]


def remade() -> Machine:
    """The machine as a report would describe it that is made today of the recorded rates."""
    report = json.loads(REPORT.read_text())
    host = next(r for r in reversed(report["rows"]) if r["pipe"] == "host read")
    cost = CostModel(**_cost_model(host["gb_s"]["median"], report["together"], None))
    return dataclasses.replace(Machine.load(REPORT), cost=cost)


def shaped(head_dim: int) -> ModelConfig:
    return dataclasses.replace(ModelConfig.tiny_llama(), head_dim=head_dim)


SHAPED = [
    (shaped(32), 1000, "float32"),
    (shaped(80), 330, "bfloat16"),
    (shaped(128), 2500, "bfloat16"),
    (shaped(256), 200, "float32"),
]
# Layers with a sliding window are not stacked.
LAID_OUT = [(*case, stacked) for case in SHAPED for stacked in (False, True)]
LAID_OUT += [(ModelConfig.tiny_gemma3(), 2500, "bfloat16", False)]


@pytest.mark.parametrize("summaries", ["host", "device"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("config", "tokens", "dtype", "stacked"), LAID_OUT)
def test_bytes_are_those_that_are_allocated(
    config: ModelConfig, tokens: int, dtype: str, stacked: bool, batch: int, summaries: Any
) -> None:
    layout = config.kv_layout(dtype, summaries)
    memory = plan(
        config, context_tokens=tokens, batch=batch, dtype=dtype, summaries=summaries
    ).memory
    cache = fx.HostKV.allocate(layout, batch, tokens, stacked=stacked)
    by_place = {"pinned_host": 0, "device": 0}
    # Counted here, not asked of the cache.
    for array in jax.tree.leaves(cache):
        by_place[array.sharding.memory_kind] += array.nbytes
    assert memory.host_bytes == by_place["pinned_host"] == cache.host_bytes
    assert memory.device_cache_bytes == pytest.approx(by_place["device"], rel=0.02)


@pytest.mark.parametrize("config", [ModelConfig.tiny_llama(), ModelConfig.tiny_gemma3()])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_those_of_the_decoder(config: ModelConfig, dtype: str) -> None:
    model = nnx.eval_shape(lambda: Decoder.random(config, dtype=dtype))
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.state(model)))
    planned = plan(config, context_tokens=8, dtype=dtype).memory.device_weight_bytes
    assert planned == pytest.approx(weights, rel=0.02)


def test_a_prediction_is_arithmetic() -> None:
    config = dataclasses.replace(ModelConfig.tiny_llama(), num_layers=2)
    found = plan(config, context_tokens=3520, batch=2, policy="fixed:16:0.05", machine=MACHINE)
    # 3,520 - 320 tokens are 200 blocks on the host; 5 % of 3,520 are 11 units, of 6 / 2 heads.
    block, summary = 2 * 16 * 64 * 2, 2 * 64
    same = 2 * 2 * 2 * (11 * block + 200 * summary)
    apart = 2 * 2 * 2 * (33 * block + 200 * summary)
    assert found.read_bytes == (same, apart)
    # A row of a table that is not the output matrix, too, is nothing.
    table = config.vocab_size * config.d_model * 2 * (not config.tied_embeddings)
    assert found.dense_s == pytest.approx((found.memory.device_weight_bytes - table) / 1e10)
    fixed_s = found.dense_s + 2 * 1e-4
    assert found.step_s == pytest.approx([fixed_s + 2e-3 + n / 1e9 for n in (same, apart)])
    full = plan(config, context_tokens=3520, batch=2, policy="full", machine=MACHINE)
    assert full.read_bytes == (2 * 2 * 2 * 200 * block,) * 2
    by_device, by_both = (
        plan(config, context_tokens=3520, batch=2, machine=MACHINE, split=split)
        for split in ("device", "model")
    )
    assert by_device.step_s[1] == pytest.approx(fixed_s + 4e-3 + apart / 5e8)
    assert by_both.step_s == pytest.approx(
        [fixed_s + 2 * COST.seconds(n / 2, "model") for n in (same, apart)]
    )


def measured(policy: str, split: str, summaries: str) -> dict[str, Any]:
    asked = policy, split, summaries
    (row,) = (r for r in STEPS if (r["policy"], r["split"], r["summaries"]) == asked)
    assert row["case"] == "llama-3.1-8b-131072-b1"
    return row


@pytest.mark.parametrize(
    "machine",
    [Machine.load(), Machine.load(REPORT), remade()],
    ids=["h100", "report", "report of today"],
)
@pytest.mark.parametrize("summaries", ["device", "host"])
@pytest.mark.parametrize(
    ("policy", "split"),
    [
        ("fixed:16:0.02:group", "model"),
        ("fixed:16:0.02:group", "host"),
        ("fixed:16:0.02:group", "device"),
        ("fixed:16:0.05", "model"),
        ("fixed:16:0.05", "host"),
        ("fixed:16:0.05", "device"),
    ],
)
def test_steps_took_what_is_predicted_to_25_percent(
    policy: str, split: Any, summaries: Any, machine: Machine
) -> None:
    found = plan(
        "8b",
        context_tokens=131_072,
        policy=policy,
        summaries=summaries,
        split=split,
        machine=machine,
    )
    row = measured(policy, split, summaries)
    read_bytes, step_s = row["host_bytes"] + row["device_bytes"], row["step_s"]["median"]
    low, high = found.read_bytes
    # Of summaries in host memory, both sides scan those of the task that they share.
    more = 1.08 if summaries == "host" else 1.0
    assert 0.99 * low <= read_bytes <= more * high
    # How far heads agree is data. For what they did read:
    read_s = 32 * found.machine.cost.seconds(read_bytes / 32, split)
    assert found.dense_s + found.layers_s + read_s == pytest.approx(step_s, rel=0.25)
    # Before anything has run there is a range, which is a point if a group has one selection.
    low_s, high_s = found.step_s
    assert 0.8 * low_s <= step_s <= 1.25 * high_s
    if split == "model":
        # The caches were random, so the heads of a group hardly agreed.
        assert high_s == pytest.approx(step_s, rel=0.25)


def test_the_time_of_a_layer_is_what_these_steps_leave() -> None:
    machine = Machine.load(REPORT)
    left = []
    for row in (row for row in STEPS if row["summaries"] == "device"):
        found = plan("8b", context_tokens=131_072, machine=machine)
        read_bytes = row["host_bytes"] + row["device_bytes"]
        read_s = 32 * machine.cost.seconds(read_bytes / 32, row["split"])
        left.append((row["step_s"]["median"] - found.dense_s - read_s) / 32)
    assert statistics.median(left) == pytest.approx(DEFAULT_LAYER_S, rel=0.02)


def test_a_report_of_the_benchmark_names_the_constants() -> None:
    report = json.loads(REPORT.read_text())
    machine = Machine.load(REPORT)
    assert dataclasses.asdict(machine.cost) == report["cost_model"]
    assert machine.cost == CostModel.load(REPORT)
    assert machine.device_bytes_per_s == pytest.approx(2.774e12, rel=1e-3)
    assert machine.layer_s == DEFAULT_LAYER_S


def test_without_a_gpu_weights_come_out_of_the_hosts_memory(tmp_path: Path) -> None:
    report = json.loads(REPORT.read_text())
    report["rows"] = [row for row in report["rows"] if row["pipe"] == "host read"]
    (tmp_path / "machine.json").write_text(json.dumps(report))
    found = Machine.load(tmp_path / "machine.json")
    assert found.device_bytes_per_s == pytest.approx(76.45e9, 1e-3)


@pytest.mark.parametrize(
    "change",
    [{"cost_model": {}}, {"cost_model": {"host_bytes_per_s": "fast"}}, {"rows": []}, {"rows": 1}]
    + [{"device_bytes_per_s": value} for value in (0, -1, float("inf"), float("nan"), "much")]
    + [{"layer_s": -1e-6}, {"cost_model": {"host_bytes_per_s": -1}}, {"cost_model": 3}],
)
def test_a_report_that_is_none_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(json.loads(REPORT.read_text()) | change))
    with pytest.raises(fx.IntegrityError, match="expected a JSON report"):
        Machine.load(path)


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
    written = json.loads((tmp_path / "plan.json").read_text())
    assert (written["model"], written["split"]) == ("8b", "host")
    options = ["--machine", str(REPORT), "--split", "model", "--summaries", "device"]
    assert main(["plan", "--model", "8b", "--context", "131072", *options]) == 0
    assert "split model" in capsys.readouterr().out
    assert set(SHAPES) == {"8b", "70b", "qwen3-8b", "mistral-7b"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "9b", "--context", "8"], 2, "expected a GGUF file, a model directory"),
        (["--model", "8b", "--context", "0"], 2, "expected an integer context_tokens >= 1"),
        (["--model", "8b", "--context", "8", "--policy", "half"], 2, "got 'half'"),
        (
            ["--model", "8b", "--context", "8", "--machine", "abacus"],
            2,
            "expected a machine's JSON",
        ),
        (["--model", "8b", "--context", "8", "--machine", __file__], 1, "expected a JSON report"),
    ],
)
def test_bad_input(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == code
    assert message in capsys.readouterr().err


def test_the_planner_and_the_split_assume_the_same_host() -> None:
    """Both predict with the constants of one machine, so that neither drifts from the other."""
    assert Machine.load().cost == CostModel()
