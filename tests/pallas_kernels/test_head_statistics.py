"""Statistics of heads: the kernels against XLA, and both against plain NumPy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import HeadStatistics, UnsupportedImplementationError, head_statistics
from pallas_kernels.head_statistics_triton import head_statistics_triton

EXECUTIONS = [
    pytest.param("interpreted", id="interpreted"),
    pytest.param("triton", id="gpu", marks=pytest.mark.gpu),
]
CONSTANTS = {"scale": 0.11, "run_tokens": 48}
NAMES = HeadStatistics._fields
BATCH, KV_HEADS = 3, 2


def operands(head_dim=64, group=3, num_runs=37, dtype="float32", seed=0, size=1.5):
    """Rows with all runs, with some and with none; windows with and without sinks."""
    rng = np.random.default_rng(seed)
    heads = KV_HEADS * group

    def normal(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    runs = normal(BATCH, KV_HEADS, num_runs, 4, head_dim) + normal(head_dim)
    runs[..., 2:, :] = np.abs(runs[..., 2:, :]) + 0.5
    host_tokens = np.asarray([48 * num_runs, 48 * (num_runs // 2) + 1, 0], np.int32)
    # What no token has reached may hold anything.
    runs[1, :, num_runs // 2 + 1 :] = np.nan
    runs[2] = np.inf
    window_scores = normal(BATCH, heads, 3, scale=3.0)
    window_scores[1, :, 1] = -np.inf
    return {
        "q": normal(BATCH, heads, head_dim, scale=size),
        "window_out": normal(BATCH, heads, head_dim),
        "window_lse": normal(BATCH, heads, scale=3.0),
        "window_scores": window_scores,
        "newest": np.asarray([40, 943, 51], np.int32),
        "runs": jnp.asarray(runs, dtype),
        "host_tokens": host_tokens,
        "previous_q": normal(BATCH, 2, heads, head_dim),
        "probe_q": normal(BATCH, heads, head_dim),
    }


def run(execution, given, **constants):
    constants = {**CONSTANTS, **constants}
    given = {name: jnp.asarray(x) for name, x in given.items()}
    if execution == "interpreted":
        program = functools.partial(head_statistics_triton, interpret=True, **constants)
        stacked = jax.jit(program, static_argnums=0)(NAMES, *given.values())
        return HeadStatistics(*np.moveaxis(np.asarray(stacked), -1, 0))
    program = functools.partial(head_statistics, implementation=execution, **constants)
    stacked = jax.jit(program)(*given.values())
    return HeadStatistics(*np.moveaxis(np.asarray(stacked), -1, 0))


def log_sum_exp(x):
    if not x.size or np.max(x) == -np.inf:
        return -np.inf
    return np.max(x) + np.log(np.sum(np.exp(x - np.max(x))))


def of_one_head(given, row, head, group, scale, run_tokens):
    """The statistics in float64, one head at a time."""
    task = head // group
    wide = {name: np.asarray(jnp.asarray(x, jnp.float32), float) for name, x in given.items()}
    q, out = wide["q"][row, head], wide["window_out"][row, head]
    lse = wide["window_lse"][row, head]
    held = int(given["host_tokens"][row])
    count = -(-held // run_tokens)
    tokens = np.minimum(held - run_tokens * np.arange(count), run_tokens)
    k, v, negated_low, high = np.moveaxis(wide["runs"][row, task, :count], 1, 0)
    s = scale * k @ q
    u = scale * (np.maximum(q, 0) * high - np.minimum(q, 0) * negated_low).sum(axis=1)
    w = np.log(tokens)
    host_lse = log_sum_exp(s + w)
    p = np.exp(s + w - host_lse)
    host_out = p @ v if count else np.zeros_like(q)
    change = host_out - out
    with np.errstate(over="ignore"):
        mass = 1 / (1 + np.exp(-np.clip(host_lse - lse, -30, 30)))
    window_peak, sink_lse, newest_lse = given["window_scores"][row, head]
    previous = wide["previous_q"][row, (given["newest"][row] - 1) % 2, head]
    probe = wide["probe_q"][row, head]
    norm = np.linalg.norm
    key_norms, value_norms = norm(k, axis=1), norm(v, axis=1)
    of_sums = [norm(x.sum(axis=0) / max(count, 1)) for x in (k, v)]

    def mean(x):
        return x.mean() if x.size else 0.0

    def spread(x):
        return x.std() if x.size else 0.0

    top = u.max() if count else 0.0
    found = {
        "score_peak": s.max() if count else 0.0,
        "score_mean": mean(s),
        "score_deviation": spread(s),
        "host_lse": host_lse,
        "bound_peak": top,
        "bound_mean": mean(u),
        "bound_deviation": spread(u),
        "entropy_bits": (p * (w - np.log(np.maximum(p, 1e-30)))).sum() / np.log(2),
        "share_squares": (p**2).sum(),
        "share_peak": p.max() if count else 0.0,
        "above_1_percent": (u + w > lse + np.log(0.01)).sum(),
        "above_10_percent": (u + w > lse + np.log(0.1)).sum(),
        "above_window": (u > lse).sum(),
        "above_window_peak": (u > window_peak).sum(),
        "within_1_of_peak": (u > top - 1).sum(),
        "within_4_of_peak": (u > top - 4).sum(),
        "out_product": host_out @ out,
        "host_out_norm": norm(host_out),
        "window_out_norm": norm(out),
        "change_norm": norm(change),
        "whole_norm": norm(out + mass * change),
        "window_peak": window_peak,
        "sink_lse": sink_lse,
        "newest_lse": newest_lse,
        "query_norm": norm(q),
        "previous_product": q @ previous,
        "previous_norm": norm(previous),
        "probe_product": q @ probe,
        "probe_norm": norm(probe),
        "key_norm": mean(key_norms),
        "key_norm_deviation": spread(key_norms),
        "mean_key_norm": of_sums[0],
        "value_norm": mean(value_norms),
        "value_norm_peak": value_norms.max() if count else 0.0,
        "mean_value_norm": of_sums[1],
    }
    return [found[name] for name in NAMES]


def expected(given, **constants):
    heads = given["q"].shape[1]
    group = heads // KV_HEADS
    constants = {**CONSTANTS, **constants}
    rows = [
        [of_one_head(given, row, head, group, **constants) for head in range(heads)]
        for row in range(BATCH)
    ]
    return HeadStatistics(*np.moveaxis(np.asarray(rows), -1, 0))


def assert_close(got, wanted, close=2e-5, on_tensor_cores=False):
    # Sums on tensor cores are as exact as float32 of their size: on an H100 the deviation of two
    # bounds of about 60 was off by 6e-5. So there its error counts relative to that size, too.
    sizes = {"bound_deviation": wanted.bound_peak} if on_tensor_cores else {}
    for name in NAMES:
        size = np.max(np.abs(sizes.get(name, 0.0)))
        np.testing.assert_allclose(
            getattr(got, name),
            getattr(wanted, name),
            rtol=close,
            atol=close * max(1.0, 0.1 * size),
            err_msg=name,
        )


@pytest.mark.parametrize("execution", ["xla", *EXECUTIONS])
@pytest.mark.parametrize(
    ("head_dim", "group", "num_runs", "dtype"),
    [
        (64, 3, 37, "float32"),
        (128, 4, 64, "bfloat16"),
        (128, 4, 300, "bfloat16"),
        (96, 7, 31, "float16"),
        (72, 1, 33, "float32"),
        (256, 8, 2, "bfloat16"),
    ],
)
def test_equals_numpy(execution, head_dim, group, num_runs, dtype):
    given = operands(head_dim, group, num_runs, dtype)
    assert_close(run(execution, given), expected(given), on_tensor_cores=execution == "triton")


@pytest.mark.parametrize("execution", ["xla", *EXECUTIONS])
def test_extreme_scores_stay_exact(execution):
    given = operands(size=300.0)
    got, wanted = run(execution, given), expected(given)
    assert_close(got, wanted, 2e-4)
    assert np.isfinite(got.entropy_bits).all()


@pytest.mark.parametrize("execution", ["xla", *EXECUTIONS])
def test_a_fault_surfaces_in_its_own_head_only(execution):
    given = operands()
    sound = run(execution, given)
    given["q"][0, 2] = np.nan
    got = run(execution, given)
    assert not np.isfinite(got.host_lse[0, 2])
    assert not np.isfinite(got.score_mean[0, 2])
    others = np.ones(got.host_lse.shape, bool)
    others[0, 2] = False
    for name in NAMES:
        np.testing.assert_array_equal(getattr(got, name)[others], getattr(sound, name)[others])


def test_no_kernel_without_a_gpu():
    if jax.default_backend() == "gpu":
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(UnsupportedImplementationError, match="expected a CUDA device"):
        run("triton", operands())


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_branches_over_one_sample_equal_each_alone(execution):
    given = operands(64, 3, 37, "bfloat16")
    others = operands(64, 3, 37, "bfloat16", seed=1)
    own = ("q", "window_out", "window_lse", "window_scores", "previous_q", "probe_q")
    axes = [0 if name in own else None for name in given]
    stacked = [
        np.stack([x, others[name]]) if name in own else jnp.asarray(x) for name, x in given.items()
    ]
    if execution == "interpreted":
        program = functools.partial(head_statistics_triton, NAMES, interpret=True, **CONSTANTS)
    else:
        program = functools.partial(head_statistics, implementation=execution, **CONSTANTS)
    found = jax.jit(jax.vmap(program, axes))(*stacked)
    both = HeadStatistics(*np.moveaxis(np.asarray(found), -1, 0))
    for i, mine in enumerate((given, {**given, **{name: others[name] for name in own}})):
        assert_close(HeadStatistics(*(np.asarray(x)[i] for x in both)), run(execution, mine), 1e-6)
