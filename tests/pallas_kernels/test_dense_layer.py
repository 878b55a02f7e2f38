"""A layer of a small network: the kernel and XLA against NumPy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import UnsupportedImplementationError, dense_layer
from pallas_kernels.dense_layer import dense_layer_triton

EXECUTIONS = [
    pytest.param("xla", id="xla"),
    pytest.param("interpreted", id="interpreted"),
    pytest.param("triton", id="gpu", marks=pytest.mark.gpu),
]


def run(execution, *operands, **constants):
    if execution == "interpreted":
        program = functools.partial(dense_layer_triton, interpret=True, **constants)
    else:
        program = functools.partial(dense_layer, implementation=execution, **constants)
    return jax.jit(program)(*map(jnp.asarray, operands))


def operands(rows, inputs, outputs, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((rows, inputs), (inputs, outputs), (outputs,))
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def expected(x, kernel, bias):
    y = x.astype(float) @ kernel.astype(float) + bias
    return y / (1 + np.exp(-y))


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("inputs_first", [False, True])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(128, 66, 256), (1, 256, 256), (37, 256, 128), (9, 128, 3), (16, 5, 33), (3, 300, 1)],
)
def test_equals_numpy(execution, inputs_first, rows, inputs, outputs):
    x, kernel, bias = operands(rows, inputs, outputs)
    given = x.T if inputs_first else x
    got = run(execution, given, kernel, bias, inputs_first=inputs_first)
    # Operands of 11 bits on a GPU.
    close = 2e-3 * np.sqrt(inputs) if jax.default_backend() == "gpu" else 1e-5 * inputs**0.5
    np.testing.assert_allclose(got, expected(x, kernel, bias), atol=close)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_fault_stays_in_its_row(execution):
    x, kernel, bias = operands(20, 66, 40)
    x[3, 7] = np.nan
    got = np.asarray(run(execution, x, kernel, bias, inputs_first=False))
    assert np.isnan(got[3]).all()
    assert np.isfinite(np.delete(got, 3, axis=0)).all()


def test_no_kernel_without_a_gpu():
    if jax.default_backend() == "gpu":
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(UnsupportedImplementationError, match="expected a CUDA device"):
        run("triton", *operands(2, 3, 4), inputs_first=False)
