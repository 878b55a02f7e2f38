"""Lowering for an H100 on a machine that has none."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

NUM_BLOCKS = 4096


def for_cuda(attend, implementation: str, dtype: str, memory_kind: str, head_dim: int) -> str:
    """Returns the StableHLO text of block-sparse attention, lowered for CUDA.

    Args:
      attend: the public op.
      implementation: its name.
      dtype: of keys and values.
      memory_kind: of keys and values.
      head_dim: H.
    """
    cpu = jax.devices("cpu")[0]
    kv = jax.ShapeDtypeStruct(
        (2, 8, NUM_BLOCKS, 16, head_dim), dtype,
        sharding=SingleDeviceSharding(cpu, memory_kind=memory_kind),
    )  # fmt: skip
    q = jax.ShapeDtypeStruct((2, 32, head_dim), jnp.float32)
    bitmap = jax.ShapeDtypeStruct((2, 32, NUM_BLOCKS // 32), jnp.uint32)

    def program(q, k, v, bitmap):
        return attend(q, k, v, bitmap, scale=0.1, implementation=implementation)

    return lower_for_cuda(program, q, kv, kv, bitmap)


def lower_for_cuda(function, *shapes: jax.ShapeDtypeStruct) -> str:
    """Returns the StableHLO text of a function of arrays of these shapes, lowered for CUDA."""
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        traced = jax.jit(function).trace(*shapes)
        return traced.lower(lowering_platforms=("cuda",)).as_text()
