"""What differs between the JAX versions that this package supports."""

from __future__ import annotations

import jax

# XLA's CPU backend before JAX 0.11 has no bfloat16 dynamic_update_slice: it converts the whole
# operand to float32 and back.
XLA_CPU_WRITES_BFLOAT16_IN_PLACE = jax.__version_info__ >= (0, 11)


def traced_for_gpu() -> bool:
    """Whether a program traced now will most likely run on a GPU.

    As JAX chooses: an abstract device (lowering for a machine that is not here) goes first, then
    `jax.default_device`, then the default backend.
    """
    platform: object = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if platform is None:
        platform = jax.config.jax_default_device  # type: ignore[attr-defined]
    if platform is None:
        platform = jax.default_backend()
    return str(getattr(platform, "platform", platform)) in ("gpu", "cuda", "rocm")


def traced_for_many() -> bool:
    """Whether the call being traced will run on several devices at once, under `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(mesh.shape[axis] > 1 for axis in getattr(mesh, "manual_axes", ()))
