"""The measurements themselves: numbers known in advance, brute force, and a tiny real run."""

from __future__ import annotations

import json
import os
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from fluxion_jax.bench import comparators, roundtrip, selection
from fluxion_jax.bench import selection_quality as quality
from fluxion_jax.bench.capture import Captured
from fluxion_jax.bench.cells import cell
from fluxion_jax.bench.host import Settings, run
from fluxion_jax.bench.host_report import render, requirements
from fluxion_jax.bench.stamp import cache_bytes
from fluxion_jax.bench.statistics import summarise
from fluxion_jax.cli import main
from fluxion_jax.plotting import host_figure
from host_ops import ceiling, native


def test_statistics_of_known_values():
    found = summarise([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (found["median"], found["min"], found["max"]) == (3.0, 1.0, 5.0)
    assert found["spread"] == pytest.approx(2 / 3)
    assert found["repetitions"] == 5


def test_a_finished_cell_is_not_measured_again(tmp_path):
    assert cell(tmp_path, "a", lambda: {"x": 1}) == {"x": 1}
    assert cell(tmp_path, "a", lambda: pytest.fail("measured again")) == {"x": 1}
    assert cell(tmp_path, "b", lambda: {"x": 2}) == {"x": 2}


def test_cache_sizes_are_read_from_sysfs(tmp_path):
    for i, (level, kind, size) in enumerate(
        [(1, "Data", "48K"), (1, "Instruction", "32K"), (3, "Unified", "2M")]
    ):
        (tmp_path / f"index{i}").mkdir()
        for name, value in (("level", level), ("type", kind), ("size", size)):
            (tmp_path / f"index{i}" / name).write_text(f"{value}\n")
    assert cache_bytes(tmp_path) == {"L1d": 48 * 1024, "L3": 2 * 1024**2}


@pytest.mark.native
@pytest.mark.parametrize("size", [1, 63, 64, (1 << 20) + 77, 3 << 20])
def test_the_ceiling_reads_every_byte(size):
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    whole = size // 64 * 64
    want = np.bitwise_xor.reduce(data[:whole].view(np.uint64), initial=0)
    want ^= np.uint64(np.bitwise_xor.reduce(data[whole:], initial=0))
    seconds, total = ceiling.read_all(data)
    assert seconds > 0
    assert total == int(want)


@pytest.mark.native
def test_a_tiny_run_has_every_figure(tmp_path):
    shapes = (16, 2), (16, 1)
    settings = Settings(shapes, (16, 128), repetitions=2, cache_bytes=1 << 21, compared_shapes=1)
    spin_us = native.info()["spin_us"]
    report = run(settings, tmp_path)
    # Threads stay awake as where a GPU calls them, unless the environment says how long.
    assert report["spin_us"] == (spin_us if "FLUXION_SPIN_US" in os.environ else 2000)
    assert native.info()["spin_us"] == spin_us
    json.dumps(report, allow_nan=False)
    assert {r["granularity"] for r in report["rows"]} == {16, 128}
    for row in report["rows"]:
        assert row["attention_gb_s"]["median"] > 0
        assert row["scoring_of_ceiling"] > 0
        assert row["rest_us"]["repetitions"] == row["rest_first_us"]["repetitions"] == 2
        assert 0 < row["own_us"]["min"] < row["rest_us"]["max"]
        assert row["rest_us"]["min"] > 0
        # With one thread nobody is idle, up to what float32 rounds; nor has scoring idle time.
        idle = row["imbalance_us"]["median"]
        assert abs(idle) < 0.1 if row["threads"] == 1 else idle > -0.1
        busy = row["scoring_without_idle_gb_s"]["median"]
        assert row["scoring_gb_s"]["median"] <= busy * 1.01
        assert ("attention_over_fastest" in row) == (row["group"] == 2 and row["threads"] > 1)
    last = [row for row in report["rows"] if row["group"] == 2 and row["threads"] > 1][-1]
    others = last["attention_comparators_gb_s"]
    assert {"jax", "jax with gather", "numpy with gather"} <= others.keys()
    fastest = max(others[name] for name in others if name.endswith("with gather"))
    assert last["attention_over_fastest"] == last["attention_gb_s"]["median"] / fastest
    assert {"numpy float32", "jax int8", "jax float32"} <= last["scoring_comparators_gb_s"].keys()
    assert last["scoring_over_fastest"] > 0
    assert len(render(report).splitlines()) >= 3 + len(report["rows"])
    figure = host_figure(report, "title")
    assert [len(axes.lines) for axes in figure.axes] == [2, 2, 2]
    drawn = [axes.lines[0].get_ydata()[-1] for axes in figure.axes]
    shares = last["attention_of_ceiling"], last["scoring_of_ceiling"]
    assert drawn == [*shares, last["selection_of_scoring"]["median"]]
    said = []
    assert run(settings, tmp_path, said.append)["rows"] == report["rows"]
    assert said == []
    assert all(item["met"] is None for item in report["requirements"][:-1])
    late = run(settings, None, budget_s=0)
    assert (late["rows"], late["noop_call_us"], len(late["left_out"])) == ([], None, 9)
    assert "not measured: head size 16, group 2, unit 16, 1 threads" in render(late)


def host_report_of(**changes) -> dict:
    """A report that meets everything by a hair, but for the changes to its row of unit 32."""

    def row(granularity, threads):
        return {
            "head_dim": 128,
            "group": 4,
            "granularity": granularity,
            "threads": threads,
            "ceiling_gb_s": {"median": 80.0},
            "attention_gb_s": {"median": 60.0},
            "attention_of_ceiling": 0.65 if granularity == 16 else 0.75,
            "scoring_gb_s": {"median": 60.0},
            "scoring_of_ceiling": 0.75,
            "selection_of_scoring": {"median": 0.15},
            "rest_us": {"median": 10.0},
            "imbalance_us": {"median": 50.0},
            **({"attention_over_fastest": 4.0, "scoring_over_fastest": 4.0} if threads > 1 else {}),
        }

    rows = [row(granularity, threads) for threads in (8, 1) for granularity in (16, 32)]
    rows[1] |= changes
    # What other shapes do does not count.
    rows.append(row(32, 8) | {"group": 7, "attention_of_ceiling": 0.1})
    report = {"threads": 8, "rows": rows, "noop_call_us": {"median": 2.0}, "left_out": []}
    report["settings"] = {"granularities": [16, 32]}
    return {**report, "requirements": requirements(report)}


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, None),
        ({"attention_of_ceiling": 0.7499}, "attention, share of the ceiling, units of 32"),
        ({"scoring_of_ceiling": 0.7499}, "scoring, share of the ceiling"),
        ({"attention_over_fastest": 3.9999}, "attention over its fastest comparator"),
        ({"scoring_over_fastest": 3.9999}, "scoring over its fastest comparator"),
        ({"selection_of_scoring": {"median": 0.15001}}, "selection, share of scoring"),
        ({"rest_us": {"median": 10.001}}, "rest of a layer in us, all threads"),
    ],
)
def test_the_report_on_the_host_says_what_is_met_and_what_is_missed(changes, missed):
    report = host_report_of(**changes)
    lines = [line for line in render(report).splitlines() if "MISSED" in line]
    assert len(lines) == (missed is not None)
    assert [item["met"] for item in report["requirements"]].count(False) == len(lines)
    assert not any(item["goal_met"] for item in report["requirements"])
    if missed:
        assert missed in lines[0]
        assert "(unit 32, 8 threads)" in lines[0]


def test_a_report_is_drawn_later_where_there_was_no_matplotlib(tmp_path, monkeypatch, capsys):
    document = tmp_path / "from-elsewhere.json"
    document.write_text(json.dumps(host_report_of() | {"variant": "scalar"}))
    command = ["bench", "host", "--report", str(document), "--output", str(tmp_path / "out")]
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib.figure", None)
        assert main(command) == 0
    said = capsys.readouterr()
    assert "required of head size 128, group 4" in said.out
    assert "no figure: expected matplotlib" in said.err
    kept = tmp_path / "out" / "bench-host.json"
    assert f"fluxion bench host --report {kept}" in said.err
    assert json.loads(kept.read_text()) == json.loads(document.read_text())
    assert main(command) == 0
    assert (tmp_path / "out" / "bench-host.png").read_bytes()[:4] == b"\x89PNG"


def test_a_row_that_is_missing_leaves_its_requirements_open():
    report = host_report_of(attention_over_fastest=None)
    open_ones = [item["figure"] for item in report["requirements"] if item["met"] is None]
    assert open_ones == ["attention over its fastest comparator"]
    del report["rows"][1]
    found = requirements(report | {"noop_call_us": None})
    # Units of 16 tokens and one thread were measured.
    assert [item["met"] for item in found].count(True) == 2
    assert [item["met"] for item in found].count(None) == 7


def test_comparators_compute_the_same_and_start_cold():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 3, 16)).astype(np.float32)
    k, v = (jnp.asarray(rng.normal(size=(2, 9, 16, 16)), jnp.bfloat16) for _ in range(2))
    ids = np.array([[1, 4, 5], [0, 2, 8]])
    cooled = []
    times = comparators.attention_times_s(q, k, v, ids, 0.25, 2, lambda: cooled.append(1))
    assert len(cooled) == 2 * len(times)
    kf, vf = (np.asarray(x, np.float32) for x in (k, v))
    kf, vf = (x[np.arange(2)[:, None], ids].reshape(2, 48, 16) for x in (kf, vf))
    got = comparators._jax_gather(q, k, v, ids, 0.25)
    want = comparators._numpy(q, np.swapaxes(kf, 1, 2), vf, 0.25)
    np.testing.assert_allclose(got, want, atol=0.03)
    q8 = rng.integers(-127, 128, (2, 3, 16)).astype(np.int8)
    rows = np.sort(rng.integers(-127, 128, (2, 5, 2, 16)), axis=2).astype(np.int8)
    products = q8[:, :, None, None].astype(int) * rows[:, None]
    want = products.max(axis=3).sum(axis=-1)
    for dtype in (jnp.int32, jnp.float32):
        np.testing.assert_array_equal(comparators._jax_scores(q8, rows, dtype), want)
    assert len(comparators.scoring_times_s(q8, rows, 1, lambda: None)) >= 3


def test_the_error_of_a_lost_fraction_is_that_of_leaving_one_out():
    above, below = np.array([1.0, 4.0, 3.0]), np.array([2.0, 5.0, 3.0])
    ratios = [7 / 8, 4 / 5, 5 / 7]
    want = np.sqrt(2 * np.var(ratios))
    assert selection.standard_error_of_ratio(above, below) == pytest.approx(want)
    assert selection.standard_error_of_ratio(below, below) == 0
    assert selection.standard_error_of_ratio(above[:1], below[:1]) == 0


def test_the_report_on_selection_says_what_integers_lose():
    totals = {
        (16, 0.05, "head", method): [np.array([m, m + 0.5, 0.1]), np.array([m, m + 0.5, 0.1])]
        for method, m in {"oracle": 0.4, "float": 0.3, "integer": 0.297, "mean": 0.2}.items()
    }
    rows = [selection._row(key, totals, 0.5) for key in totals]
    integer = rows[2]
    assert integer["lost_fraction"] == pytest.approx(0.01)
    assert integer["lost_recall"] == pytest.approx(0.003 / 0.8)
    assert integer["lost_standard_error"] == pytest.approx(0)
    assert integer["oracle_share"] == pytest.approx(0.297 / 0.4)
    assert "lost_fraction" not in rows[1]
    report = {
        "rows": rows,
        "settings": {
            "model": "m",
            "context_tokens": 1,
            "layers": 2,
            "heads": 3,
            "queries_per_head": 4,
        },
        "largest_lost_fraction": 0.01,
        "largest_lost_recall": 0.00375,
    }
    text = selection.render(report)
    assert "+1.000% ± 0.000%" in text
    assert text.endswith("+1.000% of the selected mass, +0.375% of the recall")


def layer() -> Captured:
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=s).astype(np.float32) for s in ((3, 4, 8), (2, 90, 8), (2, 90, 8)))
    return Captured(q, k, v, 0.5)


def test_scores_and_judgement_are_those_of_brute_force():
    captured, positions, host = layer(), np.array([80, 85, 89]), slice(10, 74)
    attention = quality.full_attention(captured, positions, host)
    scores = {
        m: quality.unit_scores(m, captured, attention, host, 32, False) for m in quality.METHODS
    }
    chosen = quality.select(scores["float"], 1)
    mass, error = quality.judge(chosen, captured, attention, host, 32)
    outs = np.zeros((3, 4, 2, 8))
    for t, n in np.ndindex(3, 4):
        kv, end = n // 2, positions[t] + 1
        keys, values = captured.k[kv, :end], captured.v[kv, :end]
        weights = np.exp(keys @ captured.q[t, n] * 0.5)
        weights /= weights.sum()
        bounds = []
        for u in range(2):
            unit = slice(10 + 32 * u, 42 + 32 * u)
            products = (
                captured.q[t, n] * keys[unit].min(axis=0),
                captured.q[t, n] * keys[unit].max(axis=0),
            )
            bounds.append(np.maximum(*products).sum())
            at = kv, t, n % 2, u
            assert scores["oracle"][at] == pytest.approx(weights[unit].sum(), rel=1e-4)
            assert scores["float"][at] == pytest.approx(bounds[-1], rel=1e-4)
            mean = keys[unit].mean(axis=0) @ captured.q[t, n]
            assert scores["mean"][at] == pytest.approx(mean, rel=1e-3, abs=1e-4)
        best = int(np.argmax(bounds))
        kept = np.ones(end, bool)
        kept[10:74] = False
        kept[10 + 32 * best : 42 + 32 * best] = True
        assert mass[kv, t, n % 2] == pytest.approx(scores["oracle"][kv, t, n % 2, best], rel=1e-4)
        outs[t, n] = weights @ values, weights[kept] @ values[kept] / weights[kept].sum()
    norms = np.linalg.norm(outs[:, :, 1] - outs[:, :, 0], axis=-1)
    want = norms / np.linalg.norm(outs[:, :, 0], axis=-1).max(axis=1, keepdims=True)
    np.testing.assert_allclose(np.moveaxis(error, 0, 1).reshape(3, 4), want, rtol=1e-3)
    # Integers of the product are the float bounds in steps of their head, up to rounding.
    peaks = np.abs(captured.k[:, host]).max(axis=1)
    folded = quality.grouped(captured.q, 2) * 2.0 ** np.ceil(np.log2(peaks / 127))[:, None, None]
    steps = np.abs(folded).max(axis=-1, keepdims=True) / 127
    np.testing.assert_allclose(scores["integer"] * steps, scores["float"], rtol=0.05, atol=0.3)


@pytest.mark.native
def test_a_round_trip_takes_time_and_is_told_per_layer():
    report = roundtrip.run(roundtrip.Settings((2, 6), repetitions=3))
    json.dumps(report, allow_nan=False)
    assert [r["selection"] for r in report["rows"]] == ["none", "handed over"]
    for row in report["rows"]:
        few, many = row["program_s"]["2"], row["program_s"]["6"]
        assert row["layer_us"] == pytest.approx(1e6 * (many["median"] - few["median"]) / 4)
        assert f"{row['layer_us']:.1f} us" in roundtrip.render(report)
