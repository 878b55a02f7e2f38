"""One layer of a small network: a product, a bias and an activation, in one kernel.

XLA takes two or three for it, each of which takes longer to start than to run.

Axes: R rows, F inputs, O outputs.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.compat import silence_triton_deprecation
from pallas_kernels.registry import Implementation, dispatch, require_gpu

# Of a program; few, because the programs of so few rows must fill the chip.
_ROWS, _OUTPUTS = 16, 32
# Inputs that are multiplied at once.
_INPUTS = 128


def dense_layer(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    *,
    inputs_first: bool = False,
    implementation: Implementation = None,
) -> jax.Array:
    """Returns `silu(x @ kernel + bias)`, where `silu(y) = y * sigmoid(y)`.

    Products are as exact as the platform's default for float32: on a GPU their operands have 11
    bits. The kernel cannot be differentiated; "xla" can.

    Args:
      x: float32 `[R, F]`, or `[F, R]` with `inputs_first`.
      kernel: float32 `[F, O]`.
      bias: float32 `[O]`.
      inputs_first: whether the first axis of `x` is that of the inputs.
      implementation: "triton" on a GPU, "xla" everywhere, None for the best available.

    Returns:
      float32 `[R, O]`.
    """
    result: jax.Array = dispatch(
        "dense_layer",
        implementation,
        {"triton": dense_layer_triton, "xla": _xla},
        *(x, kernel, bias),
        inputs_first=inputs_first,
    )
    return result


def _xla(x: jax.Array, kernel: jax.Array, bias: jax.Array, *, inputs_first: bool) -> jax.Array:
    y = jax.lax.dot_general(x, kernel, (((0 if inputs_first else 1,), (0,)), ((), ()))) + bias
    return jax.nn.silu(y)


def dense_layer_triton(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    *,
    inputs_first: bool,
    interpret: bool = False,
) -> jax.Array:
    """As `dense_layer`.

    Args:
      x: see `dense_layer`, as for all that follow.
      kernel: float32 `[F, O]`.
      bias: float32 `[O]`.
      inputs_first: whether the first axis of `x` is that of the inputs.
      interpret: run on any platform, slowly; for tests.

    Raises:
      UnsupportedImplementationError: not on a GPU.
    """
    require_gpu(interpret)
    rows, outputs = x.shape[1 if inputs_first else 0], kernel.shape[1]
    silence_triton_deprecation()
    result: jax.Array = pl.pallas_call(
        functools.partial(_kernel, inputs_first=inputs_first),
        grid=(pl.cdiv(rows, _ROWS), pl.cdiv(outputs, _OUTPUTS)),
        # Whole arrays: a program's part need not be whole.
        out_shape=jax.ShapeDtypeStruct((rows, outputs), jnp.float32),
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="dense_layer",
    )(x, kernel, bias)
    return result


def _kernel(
    x_ref: Any, kernel_ref: Any, bias_ref: Any, out_ref: Any, *, inputs_first: bool
) -> None:
    inputs, outputs = kernel_ref.shape
    row = pl.program_id(0) * _ROWS + jnp.arange(_ROWS, dtype=jnp.int32)
    output = pl.program_id(1) * _OUTPUTS + jnp.arange(_OUTPUTS, dtype=jnp.int32)
    in_rows, in_outputs = row < out_ref.shape[0], output < outputs

    def grid(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        shape = (a.size, b.size)
        return jnp.broadcast_to(a[:, None], shape), jnp.broadcast_to(b[None, :], shape)

    bias = pltriton.load(bias_ref.at[output], mask=in_outputs, other=0.0)
    y = jnp.broadcast_to(bias[None, :], (_ROWS, _OUTPUTS))
    for first in range(0, inputs, _INPUTS):
        part = first + jnp.arange(
            max(16, min(_INPUTS, pl.next_power_of_2(inputs - first))), dtype=jnp.int32
        )
        at = grid(row, part)
        mask = in_rows[:, None] & (part < inputs)[None, :]
        x = pltriton.load(x_ref.at[at[::-1] if inputs_first else at], mask=mask, other=0.0)
        mask = (part < inputs)[:, None] & in_outputs[None, :]
        weights = pltriton.load(kernel_ref.at[grid(part, output)], mask=mask, other=0.0)
        y += jax.lax.dot(x, weights, preferred_element_type=jnp.float32)
    y = y / (1.0 + jnp.exp(-y))
    mask = in_rows[:, None] & in_outputs[None, :]
    pltriton.store(out_ref.at[grid(row, output)], y, mask=mask)
