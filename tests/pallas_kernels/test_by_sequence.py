"""Functions of a sequence's heads: the kernel and XLA against NumPy."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import HEADS, OfGroups, UnsupportedImplementationError, by_sequence
from pallas_kernels.by_sequence import by_sequence_triton

EXECUTIONS = [
    pytest.param("xla", id="xla"),
    pytest.param("interpreted", id="interpreted"),
    pytest.param("triton", id="gpu", marks=pytest.mark.gpu),
]
# Query heads and KV heads: also numbers of neither that are powers of two.
SHAPES = [(1, 1), (3, 1), (6, 2), (8, 8), (28, 4), (32, 8), (64, 8), (33, 11)]


@dataclasses.dataclass(frozen=True)
class Everything:
    """Whatever a function may load and combine."""

    factor: float

    def __call__(self, heads):
        x = heads.load("numbers", HEADS)
        column = heads.load("columns", HEADS, 2)
        slot = heads.load("slot")
        chosen = heads.load("slots", slot, HEADS)
        vector = heads.load("layers", heads.load("layer"), HEADS, 1)
        table = heads.load("columns", HEADS, ...)
        weights = heads.load("weights", ..., 1)
        weighted = jnp.sum(table * weights[None, :], axis=1)
        sums = [heads.total_of_group(x), heads.largest_of_group(x)]
        scalars = [heads.total(column), heads.largest(column), heads.load("shared", 1)]
        counts = heads.index * heads.group + slot
        return (
            [self.factor * x, column, chosen, vector, weighted, *sums, *scalars],
            [heads.total_of_group(counts), counts],
            OfGroups([heads.total_of_group(counts), heads.index // heads.group]),
        )


def operands(heads, seed=0, batch=3):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        # Negative everywhere, so that a head too many would be the largest.
        return (rng.standard_normal(shape) - 9.0).astype(np.float32)

    rows = {
        "numbers": normal(batch, heads),
        "columns": normal(batch, heads, 5),
        "slot": rng.integers(0, 2, batch).astype(np.int32),
        "slots": normal(batch, 2, heads),
    }
    shared = {
        "layer": np.asarray(1, np.int32),
        "layers": normal(2, heads, 3),
        "weights": normal(5, 2),
        "shared": normal(4),
    }
    return rows, shared


def expected(rows, shared, heads, kv_heads):
    group = heads // kv_heads
    floats, counts = [], []
    for row in range(len(rows["slot"])):
        x, columns = (rows[name][row].astype(float) for name in ("numbers", "columns"))
        grouped = x.reshape(kv_heads, group)
        columns_of_heads = columns[:, 2]
        found = [
            2.5 * x,
            columns_of_heads,
            rows["slots"][row, rows["slot"][row]],
            shared["layers"][1, :, 1],
            columns @ shared["weights"][:, 1].astype(float),
            np.repeat(grouped.sum(axis=1), group),
            np.repeat(grouped.max(axis=1), group),
            columns_of_heads.sum(),
            columns_of_heads.max(),
            shared["shared"][1],
        ]
        floats.append([np.broadcast_to(y, heads) for y in found])
        count = np.arange(heads) * group + rows["slot"][row]
        counts.append([np.repeat(count.reshape(kv_heads, group).sum(axis=1), group), count])
    return np.moveaxis(floats, 0, 1), np.moveaxis(counts, 0, 1)


def program(execution, heads, kv_heads, function=None, programs=1):
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "programs": programs}
    function = Everything(2.5) if function is None else function
    if execution == "interpreted":
        return functools.partial(by_sequence_triton, function=function, interpret=True, **sizes)
    return functools.partial(by_sequence, function, implementation=execution, **sizes)


# The second list has fewer results than there are programs.
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "programs"), [*((*x, 1) for x in SHAPES), (6, 2, 3), (33, 11, 3)]
)
def test_equals_numpy(execution, heads, kv_heads, programs):
    rows, shared = operands(heads)
    run = program(execution, heads, kv_heads, programs=programs)
    floats, counts, of_groups = jax.jit(run)(rows, shared)
    assert floats.dtype == jnp.float32
    assert counts.dtype == jnp.int32
    wanted_floats, wanted_counts = expected(rows, shared, heads, kv_heads)
    np.testing.assert_allclose(floats, wanted_floats, rtol=1e-5)
    np.testing.assert_array_equal(counts, wanted_counts)
    np.testing.assert_array_equal(of_groups[0], wanted_counts[0, :, :: heads // kv_heads])
    np.testing.assert_array_equal(of_groups[1], np.broadcast_to(np.arange(kv_heads), (3, kv_heads)))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_branches_with_rows_of_their_own_equal_each_alone(execution):
    (rows, shared), (others, _) = operands(6), operands(6, seed=1)
    both = {name: np.stack([x, others[name]]) for name, x in rows.items()}
    run = program(execution, 6, 2, programs=3)
    found = jax.jit(jax.vmap(run, (0, None)))(both, shared)
    for i, mine in enumerate((rows, others)):
        for got, wanted in zip(found, jax.jit(run)(mine, shared), strict=True):
            np.testing.assert_allclose(got[i], wanted, rtol=1e-6)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_fault_stays_with_its_head(execution):
    @dataclasses.dataclass(frozen=True)
    class Logarithm:
        def __call__(self, heads):
            return ([jnp.log(heads.load("numbers", HEADS))],)

    numbers = np.ones((2, 5), np.float32)
    numbers[1, 3] = np.nan
    (got,) = jax.jit(program(execution, 5, 5, Logarithm()))({"numbers": numbers}, {})
    np.testing.assert_array_equal(np.isnan(got[0]), np.isnan(numbers))


def test_no_kernel_without_a_gpu():
    if jax.default_backend() == "gpu":
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(UnsupportedImplementationError, match="expected a CUDA device"):
        program("triton", 3, 1)(*operands(3))
