"""Every difference between JAX versions that the kernels have to know, and nothing else.

Supported: JAX 0.10.2 (the last for Python 3.11) and JAX 0.11.2 or newer.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp


def target_platform() -> str:
    """Returns the platform that a program traced now will most likely run on: "cpu", "gpu", ...

    An abstract mesh with an abstract device (lowering for a machine that is not here) goes first,
    then `jax.default_device`, then the default backend.
    """
    abstract_device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract_device is not None:
        return _canonical(str(abstract_device.platform))
    default_device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if isinstance(default_device, str):
        return _canonical(default_device)
    if default_device is not None:
        return _canonical(str(default_device.platform))
    return _canonical(jax.default_backend())


def _canonical(platform: str) -> str:
    return "gpu" if platform in ("cuda", "rocm") else platform


def take_rows(array: jax.Array, task: jax.Array, row: jax.Array) -> jax.Array:
    """Returns `array[task, row]` in float32 without touching the rest of the array.

    The CPU backend of JAX 0.10 has no bfloat16 gather: it converts the whole operand to float32
    first, and hoists that out of any loop. Gathering the bits as integers avoids the conversion,
    and the barrier ties the operand to `row`, so that nothing about it is loop invariant.

    Args:
      array: float32, bfloat16 or float16 `[X, P, ...]`.
      task: int32 `[]`, in range.
      row: int32 `[M]`, in range.

    Returns:
      float32 `[M, ...]`.
    """
    if array.dtype != jnp.bfloat16:
        return array[task, row].astype(jnp.float32)
    array, row = jax.lax.optimization_barrier((array, row))
    bits = jax.lax.bitcast_convert_type(array, jnp.uint16)[task, row]
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)


def silence_triton_deprecation() -> None:
    """Hides from users that JAX has deprecated the Triton backend: it is ours to replace.

    The warning comes while a program is lowered, long after our code has returned, so no context
    manager of ours can catch it.
    """
    warnings.filterwarnings(
        "ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning
    )


def compute_capability() -> tuple[int, int] | None:
    """Returns the compute capability of the GPUs here, or None if there is none to ask."""
    devices = jax.local_devices()
    text = getattr(devices[0], "compute_capability", None)
    if devices[0].platform != "gpu" or text is None:
        return None
    major, minor = str(text).split(".")[:2]
    return int(major), int(minor)


def mosaic_load(ref: Any, layout: Any) -> jax.Array:
    """Loads a whole reference inside a Mosaic kernel, into registers of the given layout.

    Until JAX 0.11 `load` takes an index; since then that form is deprecated.
    """
    from jax.experimental.pallas import mosaic_gpu

    index: dict[str, Any] = {"idx": ()} if jax.__version_info__ < (0, 11) else {}
    return mosaic_gpu.load(ref, **index, layout=layout, optimized=False)


def mosaic_store(ref: Any, value: jax.Array) -> None:
    """Stores to a whole reference of global memory, in whatever layout the value is.

    Where JAX (0.12) has an explicit store, an assignment refuses rows of less than 128 bytes.
    """
    from jax.experimental.pallas import mosaic_gpu

    store = getattr(mosaic_gpu, "store", None)
    if store is None:
        ref[...] = value
    else:
        store(ref, value, optimized=False)


def mosaic_interpreter() -> Any:
    """Returns what makes a Mosaic kernel run without a GPU, or None where JAX (0.10) cannot."""
    from jax.experimental.pallas import mosaic_gpu

    params = getattr(mosaic_gpu, "InterpretGPUParams", None)
    return None if params is None else params()
