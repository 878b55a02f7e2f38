"""The measurements themselves: numbers known in advance, brute force, and a tiny real run."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from fluxion_jax.bench import comparators, roundtrip, selection
from fluxion_jax.bench import selection_quality as quality
from fluxion_jax.bench.capture import Captured
from fluxion_jax.bench.cells import cell
from fluxion_jax.bench.host import Settings, render, run
from fluxion_jax.bench.stamp import cache_bytes
from fluxion_jax.bench.statistics import summarise
from fluxion_jax.plotting import host_figure
from host_ops import ceiling


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
    report = run(settings, tmp_path)
    json.dumps(report, allow_nan=False)
    assert {r["granularity"] for r in report["rows"]} == {16, 128}
    for row in report["rows"]:
        assert row["attention_gb_s"]["median"] > 0
        assert row["scoring_of_ceiling"] > 0
        assert row["rest_us"]["repetitions"] == row["rest_first_us"]["repetitions"] == 2
        assert ("attention_over_fastest" in row) == (row["group"] == 2 and row["threads"] > 1)
    last = [row for row in report["rows"] if row["group"] == 2][-1]
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
