"""The roofline and the predictions; what they show is made up."""

from __future__ import annotations

import pytest

from fluxion_jax.bench.figures import prediction_figure, roofline_figure
from fluxion_jax.planning import Machine, plan
from fluxion_jax.policy import CostModel


def row(group, granularity, threads, speed):
    return {
        "group": group,
        "granularity": granularity,
        "threads": threads,
        "ceiling_gb_s": {"median": 10.0},
        "attention_gb_s": {"median": speed},
    }


def test_the_roof_is_the_lower_of_both_ceilings_and_marks_are_at_the_group():
    rows = [row(1, 16, 1, 2.0), row(1, 16, 2, 8.0), row(4, 16, 2, 7.0), row(4, 64, 2, 9.0)]
    (axes,) = roofline_figure({"rows": rows}, 100.0, "A title").axes
    roof, fine, coarse = axes.lines
    x, y = roof.get_data()
    assert y[0] == pytest.approx(10.0 * x[0])
    assert y.max() == y[-1] == 100.0
    # With all threads only: operations per second at as many operations a byte as heads share it.
    assert fine.get_xydata().tolist() == [[1, 8.0], [4, 28.0]]
    assert coarse.get_xydata().tolist() == [[4, 36.0]]
    assert axes.get_ylim()[0] < 8.0


def test_the_parts_of_a_prediction_add_up_to_the_step():
    machine = Machine("a machine", CostModel(10e9, 5e9, 20e-6, 30e-6), 1e12, 50e-6)
    plans = [
        plan("8b", context_tokens=n, policy=policy, machine=machine)
        for n, policy in ((8192, "full"), (131_072, "fixed:16:0.05"))
    ]
    (axes,) = prediction_figure(plans, ["short", "long"], "A title").axes
    weights, layers, agreed, apart = axes.containers
    for i, predicted in enumerate(plans):
        parts = [bars[i].get_width() for bars in (weights, layers, agreed, apart)]
        assert sum(parts[:3]) == pytest.approx(1e3 * predicted.step_s[0])
        assert sum(parts) == pytest.approx(1e3 * predicted.step_s[1])
    assert apart[0].get_width() == 0 < apart[1].get_width()
    assert layers[0].get_width() == pytest.approx(32 * 50e-3)
    texts = [text.get_text() for text in axes.texts]
    low, high = (1e3 * seconds for seconds in plans[1].step_s)
    assert texts[1] == f"{low:,.0f} to {high:,.0f} ms"
