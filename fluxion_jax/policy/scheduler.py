"""The scheduler's feedback: a cost model corrected by the times that collect brings back.

Rates depend on what a machine does besides, and on how far a group's selections overlap, which no
model knows beforehand. So `split="adaptive"` keeps, for each side, the logarithm of how much faster
it has been than the model, as part of the cache, and every layer of every step corrects it: a host
that slows down gives up its share within a few layers. Tasks are cut as with `split="model"`,
largest first; a group whose heads all stream has no task.

The host's time is its own clock's. The device's is seen only from there: where collect had to wait
for the host, it came when the device was done. Where it did not, the device took longer, nobody
knows by how much, and it is taken for a little slower than before, until the host is the last by a
hair again.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

import host_ops
from fluxion_jax.policy.cost_model import MIN_RANGE_BYTES, CostModel

_SPAN, _WAITED = host_ops.TIMES.index("span"), host_ops.TIMES.index("waited")
# A layer moves the estimate by an eighth: noise of single layers averages out over a step.
_WEIGHT = 1 / 8
# Beyond a factor of 64 a clock is wrong, not a machine slow.
_MOST_LOG2 = 6.0
_LEAST_S = 1e-6
# Collect takes about this long to see that the host is done already.
_PROMPT_S = 2e-6
# An eighth of it a layer: two percent.
_SLOWER_LOG2 = 0.25


def corrected(cost: CostModel, pace: jax.Array) -> CostModel:
    """The model with both rates at the pace that was measured; fixed costs stay."""
    faster: Any = jnp.exp2(pace)
    return dataclasses.replace(
        cost,
        host_bytes_per_s=cost.host_bytes_per_s * faster[0],
        pcie_bytes_per_s=cost.pcie_bytes_per_s * faster[1],
    )


def observe(
    pace: jax.Array,
    cost: CostModel,
    host_bytes: jax.Array,
    device_bytes: jax.Array,
    times_s: jax.Array,
) -> jax.Array:
    """The pace after one more layer.

    Args:
      pace: float32 `[2]`, log2 of the measured over the modelled rates of host and device.
      cost: the model, uncorrected.
      host_bytes: float32 scalar, what the host read in this layer.
      device_bytes: float32 scalar, likewise the device out of host memory.
      times_s: float32 `[9]`, in the order of `host_ops.TIMES`.

    Returns:
      float32 `[2]`. A side that read less than 64 KiB tells nothing of its rate.
    """
    span, waited = times_s[_SPAN], times_s[_WAITED]
    host = _log2_rate(host_bytes, span - cost.host_fixed_s, cost.host_bytes_per_s)
    device_s = span - waited - cost.device_fixed_s
    device = _log2_rate(device_bytes, device_s, cost.pcie_bytes_per_s)
    unseen = jnp.minimum(device, pace[1] - _SLOWER_LOG2)
    measured = jnp.stack([host, jnp.where(waited > _PROMPT_S, device, unseen)])
    told = jnp.stack([host_bytes, device_bytes]) >= MIN_RANGE_BYTES
    told &= (span > 0) & jnp.isfinite(measured)
    return jnp.where(told, pace + _WEIGHT * (measured - pace), pace)


def _log2_rate(num_bytes: jax.Array, seconds: jax.Array, modelled: jax.Array | float) -> jax.Array:
    rate = jnp.maximum(num_bytes, 1.0) / jnp.maximum(seconds, _LEAST_S)
    return jnp.clip(jnp.log2(rate / modelled), -_MOST_LOG2, _MOST_LOG2)
