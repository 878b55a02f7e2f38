"""One layer of a cache whose layers share one array of each kind, for loops over layers.

A loop over layers must not cut a layer out of arrays in host memory, nor choose among them by a
conditional: XLA copies what it cuts and, with JAX 0.10, the operands of a conditional. So such a
cache keeps the rows of all layers one behind the other, `[L * B, K, ...]`, and host operations and
kernels get the first row of a layer as an operand. What else lies on the device is small: a layer's
part is taken out and put back. Axes: L layers of a kind, B batch, K KV heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from fluxion_jax.cache.host_kv import HostKV
from fluxion_jax.errors import ConfigError
from fluxion_jax.status import STATUS_LAYER
from pallas_kernels.compat import target_platform

_R = TypeVar("_R")


def on_layer(
    function: Callable[[HostKV], tuple[_R, HostKV]],
    cache: HostKV,
    layer: int | jax.Array,
    *,
    sliding: bool = False,
) -> tuple[_R, HostKV]:
    """Runs a function on one layer of a stacked cache.

    Args:
      function: `(cache) -> (result, cache)`. The cache it gets has the arrays of this one layer,
        but those in host memory whole, on a GPU also summaries on the device, and `first_row` says
        where the layer begins in these.
      cache: a stacked cache.
      layer: index of the layer in the model: a Python int, or an int32 scalar inside of a loop. A
        value that is no layer of the kind ends in a status, and changes nothing.
      sliding: whether it is a sliding-window layer.

    Returns:
      The result, and the stacked cache with the layer as the function left it.

    Raises:
      ConfigError: a Python int that is no layer of the kind, or there is no layer of it at all.
    """
    index, known = _position(cache, layer, sliding)
    first = jnp.asarray(index * cache.batch, jnp.int32)
    names = ["sliding_k", "sliding_v"] if sliding else ["exponents", "window_k", "window_v"]
    if not sliding and cache.layout.summaries == "device" and target_platform() != "gpu":
        # There kernels read and write the layer's part where it is.
        names.append("summaries")
    cut = {
        name: (jax.lax.dynamic_slice_in_dim(getattr(cache, name)[0], first, cache.batch, axis=0),)
        for name in names
    }
    status = cache.status | jnp.where(known, 0, STATUS_LAYER)
    result, after = function(
        cache.replace(stacked=False, first_row=first[None], status=status, **cut)
    )
    put = {
        name: (
            jax.lax.dynamic_update_slice_in_dim(
                getattr(cache, name)[0], getattr(after, name)[0], first, axis=0
            ),
        )
        for name in names
    }
    return result, after.replace(stacked=True, first_row=None, **put)


def first_row_in(cache: HostKV, array: jax.Array) -> jax.Array | None:
    """Where the layer at work begins in an array, if that holds those of other layers, too."""
    return None if len(array) == cache.batch else cache.first_row


def _position(cache: HostKV, layer: int | jax.Array, sliding: bool) -> tuple[Any, Any]:
    """Position among the layers of its kind, and whether it is one."""
    layout = cache.layout
    if isinstance(layer, int | np.integer):
        find = layout.sliding_index if sliding else layout.global_index
        return find(int(layer)), True
    layers = layout.sliding_layers if sliding else layout.global_layers
    if not layers:
        kind = "sliding" if sliding else "global"
        raise ConfigError(
            f"expected a cache with {kind} layers, got one of {layout.num_layers} layers of the "
            "other kind; name the sliding layers in KVLayout(sliding_layers=...)"
        )
    found = jnp.asarray(layers) == layer
    return jnp.argmax(found), found.any()
