"""Calls Python with NumPy views of XLA's own buffers, some of them changed in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.buffer_callback import buffer_callback


def call_in_place(
    run: Callable[[Sequence[np.ndarray], Sequence[np.ndarray], Any], None],
    changed: Sequence[jax.Array],
    result_types: Sequence[jax.ShapeDtypeStruct],
    operands: Any,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Runs `run(changed, results, operands)` on the CPU backend without copying anything.

    Args:
      run: gets NumPy views; it changes `changed` and fills `results`. It must not call JAX.
      changed: arrays typed as device memory, changed in place if the enclosing jit donates them.
      result_types: of the fresh results.
      operands: pytree of arrays that are only read.

    Returns:
      The changed arrays and the results.
    """
    flat, tree = jax.tree.flatten(operands)
    size = len(changed)

    def callback(_: Any, outputs: Sequence[Any], *inputs: Any) -> None:
        results = [np.asarray(x) for x in outputs]
        views = [np.asarray(x) for x in inputs[size:]]
        run(results[:size], results[size:], jax.tree.unflatten(tree, views))

    changed_types = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in changed]
    call = buffer_callback(
        callback,
        [*changed_types, *result_types],
        has_side_effect=True,
        input_output_aliases={i: i for i in range(size)},
    )
    results = call(*changed, *flat)
    return results[:size], results[size:]
