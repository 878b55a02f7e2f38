"""An order between operations that the compiler cannot forget."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def after(x: jax.Array, earlier: Sequence[jax.Array]) -> jax.Array:
    """Returns int32 `x`, which then cannot be known before all of `earlier` is.

    A true data dependence: XLA of JAX 0.10 forgets optimization barriers before it decides which
    buffers must be copied, and would copy a cache that somebody may still read.
    """
    positive = [(y.ravel()[0] > 0).astype(jnp.int32) for y in earlier if y.size]
    if not positive:
        return x
    # Always 0, but not in the eyes of XLA's simplifier.
    return x + jnp.minimum(jnp.sum(jnp.stack(positive)), 0)
