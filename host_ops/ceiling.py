"""How fast the pool's threads can read: the bound that kernels are compared with."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from host_ops import native


def read_all(array: npt.NDArray[np.generic]) -> tuple[float, int]:
    """Reads an array once from one end to the other with all threads of the pool.

    Args:
      array: contiguous, of any shape and dtype, not empty. Of a JAX array in host memory
        `np.asarray` gives a view, so its own pages are read.

    Returns:
      `(seconds, sum)`: the time it took, and the exclusive or of all 64-bit words and of the bytes
      that are left, by which a test sees that everything was read.

    Raises:
      ValueError: the array is empty or not contiguous.
      RuntimeError: the native library cannot be used.
    """
    if not array.flags.c_contiguous or array.nbytes == 0:
        raise ValueError(
            f"array: expected a contiguous one that is not empty, got shape {array.shape} and "
            f"strides {array.strides}; pass a copy"
        )
    native.require()
    library = ctypes.CDLL(str(native.library_path()))
    library.fluxion_read_all.restype = ctypes.c_double
    library.fluxion_read_all.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    total = ctypes.c_uint64()
    seconds = library.fluxion_read_all(array.ctypes.data, array.nbytes, ctypes.byref(total))
    if seconds < 0:
        raise RuntimeError("expected the pool to read the array, got a failure; is memory full?")
    return float(seconds), total.value
