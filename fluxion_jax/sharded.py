"""Attention on several devices: the KV heads are spread over them, each has its own host cache.

A device's share is an ordinary cache of fewer heads, so under `shard_map` the same code runs as on
one device; attention of different heads needs no exchange. Only a policy may look at all heads, and
an error anywhere must stop everybody. Axes: B batch, N query heads, K KV heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fluxion_jax.cache.host_kv import HostKV
from fluxion_jax.errors import ConfigError
from fluxion_jax.policy.protocol import Features, Plan, Policy


def on_shards(
    function: Callable[..., tuple[Any, HostKV]],
    cache: HostKV,
    by_head: tuple[jax.Array, ...],
    others: Any,
    *,
    head_axis: int,
    results: Any,
) -> tuple[Any, HostKV]:
    """Runs a function of a cache on every device's share of it.

    Args:
      function: `(cache, by_head, others) -> (results, cache)`, for a cache on one device.
      cache: a cache with a placement.
      by_head: arrays whose `head_axis` is one of KV heads or of query heads, in the cache's order.
      others: pytree of what every device gets whole.
      head_axis: where `by_head` has its heads.
      results: a pytree of head axes, as in `function`'s results: an int, or None for what is the
        same everywhere.

    Returns:
      The results and the cache; its status has the errors of all devices.
    """
    placement = cache.placement
    assert placement is not None

    def spec(axis: int | None) -> PartitionSpec:
        if axis is None:
            return PartitionSpec()
        return PartitionSpec(*[None] * axis, placement.axis)

    def run(cache: HostKV, by_head: Any, others: Any) -> tuple[Any, HostKV]:
        outputs, new = function(placement.local(cache), by_head, others)
        everybody = jax.lax.all_gather(new.status, placement.axis)
        status = jnp.bitwise_or.reduce(everybody, axis=0)
        # One pace for all, or each device would cut its tasks by its own.
        pace = jax.lax.pmean(new.pace, placement.axis)
        return outputs, new.replace(
            layout=cache.layout, placement=placement, status=status, pace=pace
        )

    specs = placement.specs(cache)
    return jax.shard_map(  # type: ignore[no-any-return]
        run,
        mesh=placement.mesh,
        in_specs=(specs, spec(head_axis), PartitionSpec()),
        out_specs=(jax.tree.map(spec, results, is_leaf=lambda x: x is None), specs),
        check_vma=False,
    )(cache, by_head, others)


@dataclasses.dataclass(frozen=True)
class AllHeads:
    """Lets a policy plan for all heads of the model on a device that has only some of them.

    Attributes:
      policy: the policy.
      axis: name of the mesh axis that the heads are spread over.
    """

    policy: Policy
    axis: str

    def plan(self, features: Features, lengths: jax.Array) -> Plan:
        """This device's part of the plan; see `Policy.plan`."""
        count = jax.lax.axis_size(self.axis)

        def gathered(x: jax.Array) -> jax.Array:
            return jax.lax.all_gather(x, self.axis, axis=1, tiled=True)

        everything = features._replace(
            q=gathered(features.q),
            window_out=gathered(features.window_out),
            window_lse=gathered(features.window_lse),
            num_kv_heads=features.num_kv_heads * count,
            layout=dataclasses.replace(
                features.layout, num_kv_heads=features.layout.num_kv_heads * count
            ),
            window_k=gathered(features.window_k),
        )
        plan = self.policy.plan(everything, lengths)

        def mine(name: str, heads: int) -> jax.Array:
            whole = jnp.asarray(getattr(plan, name))
            if whole.ndim != 2 or whole.shape[1] != heads * count:
                raise ConfigError(
                    f"expected {name} of the policy's plan for {heads * count} heads, got shape "
                    f"{whole.shape}; see fluxion_jax.Plan"
                )
            first = jax.lax.axis_index(self.axis) * heads
            return jax.lax.dynamic_slice_in_dim(whole, first, heads, axis=1)

        return Plan(
            granularity=mine("granularity", features.num_kv_heads),
            budget_tokens=mine("budget_tokens", features.q.shape[1]),
            shared=mine("shared", features.num_kv_heads),
            clipped=None if plan.clipped is None else mine("clipped", features.q.shape[1]),
        )
