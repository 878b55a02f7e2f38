"""Re-tagging: change the memory space of a value in JAX's type system, and nothing else.

The FFI returns arrays that JAX types as device memory, although an aliased result still lies in
the pinned host buffer it was given; and XLA refuses to mix the two spaces. `retag` states the
truth that the type system cannot see. No operation is emitted, so no copy is made.

On a GPU a value whose tag and place differ may only flow into custom calls (FFI, Pallas); on the
CPU backend both spaces are the same memory, so any operation may use it.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
from jax.extend import core as jex_core
from jax.interpreters import mlir

# The class is an attribute of a namespace object, which a type checker cannot name.
Space: TypeAlias = Any

HOST = jax.memory.Space.Host
DEVICE = jax.memory.Space.Device

_retag_p = jex_core.Primitive("fluxion_retag")


@_retag_p.def_impl
def _retag_impl(x: jax.Array, *, space: Space) -> jax.Array:
    return jax.device_put(x, space)


@_retag_p.def_abstract_eval
def _retag_abstract_eval(aval: Any, *, space: Space) -> Any:
    return aval.update(memory_space=space)


def _retag_lowering(ctx: Any, operand: Any, *, space: Space) -> Any:
    del ctx, space
    return [operand]


mlir.register_lowering(_retag_p, _retag_lowering)


def retag(x: jax.Array, space: Space) -> jax.Array:
    """Returns `x` with its memory space declared to be `space`.

    Args:
      x: any array, of any shape and dtype.
      space: `HOST` (pinned host memory) or `DEVICE`.

    Returns:
      The same buffer under the new type. Outside of `jax.jit` this is a `jax.device_put`, which
      does copy, because a concrete array cannot lie about its place.
    """
    if jax.typeof(x).memory_space == space:
        return x
    return _retag_p.bind(x, space=space)  # type: ignore[no-any-return]
