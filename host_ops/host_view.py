"""A NumPy view of an array in host memory, which neither copies nor keeps anything alive."""

from __future__ import annotations

import ctypes

import jax
import numpy as np


def host_view(x: jax.Array) -> np.ndarray:
    """Returns the memory of a host array as NumPy sees it, writable.

    `np.asarray` would keep a copy with the array on a GPU. The view does not keep `x` alive, so it
    must not outlive it; and whoever writes must know that no program uses `x` at the time.

    Args:
      x: an array on one device whose memory kind is `pinned_host`, of any shape and dtype.

    Returns:
      `x`'s shape and dtype.
    """
    x.block_until_ready()
    if not x.nbytes:
        return np.zeros(x.shape, x.dtype)
    memory = (ctypes.c_uint8 * x.nbytes).from_address(x.unsafe_buffer_pointer())
    return np.ctypeslib.as_array(memory).view(x.dtype).reshape(x.shape)
