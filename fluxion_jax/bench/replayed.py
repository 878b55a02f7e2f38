"""What `fluxion bench policy` times: replayed plans, and a predictor that still executes.

Whose plans are replayed is data, so baselines and plan sets share a program. With a predictor the
policy fluxion plans as it would, by random weights on the real features, and every number of the
replayed plan waits for that plan and depends on it by a condition that never holds and that no
compiler can know. Axes: B batch, N query heads, K KV heads, H head size, W window slots.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fluxion_jax.bench.idle import idle_share
from fluxion_jax.bench.random_arrays import random_array
from fluxion_jax.bench.step_programs import time_calls
from fluxion_jax.cache.host_kv import HostKV
from fluxion_jax.cache.layout import BLOCK_TOKENS, host_tokens
from fluxion_jax.division import divide
from fluxion_jax.models.config import ModelConfig
from fluxion_jax.policy import Features, FluxionPolicy, Plan, ReplayPolicy, adaptive
from fluxion_jax.policy.fluxion_policy import Safety
from fluxion_jax.policy.head_predictor import HeadPredictor

# A loop goes through several layers: they share what depends on none of them, and at batch 4 and
# 32K tokens what one has read is no longer in the device's caches when it comes again.
_LAYERS = 8
_LOOPS = 6
_REPETITIONS = 5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Replayed:
    """Replayed plans, with or without the cost of predicting.

    Attributes:
      plans: what is planned.
      shared: bool scalar, whether every group ranks once.
      predictor: executes, and decides nothing; None leaves it out.
    """

    plans: ReplayPolicy
    shared: Any
    predictor: FluxionPolicy | None = None

    @property
    def needs_sketch(self) -> bool:
        """Whether it looks at the cache's sketch."""
        return self.predictor is not None

    def plan(self, features: Features, lengths: jax.Array) -> Plan:
        """Plans as recorded; see `Policy.plan`."""
        plan = self.plans.plan(features, lengths)
        plan = plan._replace(shared=jnp.full(plan.shared.shape, self.shared, bool))
        if self.predictor is None:
            return plan
        predicted = self.predictor.plan(features, lengths)
        # Neither is ever negative, which follows from no type.
        return plan._replace(
            granularity=jnp.where(predicted.granularity < 0, 0, plan.granularity),
            budget_tokens=jnp.where(predicted.budget_tokens < 0, 0, plan.budget_tokens),
            clipped=predicted.clipped,
        )


def random_predictor(config: ModelConfig) -> FluxionPolicy:
    """A policy fluxion of this model's shape that was never trained."""
    network = HeadPredictor(config.num_layers, config.num_heads, rngs=nnx.Rngs(0))
    graph, weights = nnx.split(network)
    nothing = jnp.zeros(2)
    safety = Safety(jnp.asarray([0.02, 0.5]), nothing, nothing)
    return FluxionPolicy(weights, safety, jnp.asarray(0.2), graph)


def planning_s(config: ModelConfig, cache: HostKV) -> dict[str, list[float]]:
    """Seconds of a layer's features, prediction, choice and split, one after the other, alone.

    On a GPU it is the time in which kernels run, without that of launching them: in a step they
    are launched while earlier ones run. What the loop itself takes is measured and left out. It
    goes through layers as a step does, each needing the plan of the one before and reading what is
    its own. What XLA moves out of the loop is left out: on a GPU that is what a step's layers
    share, on a CPU also what follows from a layer's sketch alone.

    Args:
      config: the model's sizes.
      cache: with a sketch; its first layers are looked at.

    Returns:
      `plan`: features, predictor and selector. `split`: with the split, less the plan alone.
    """
    policy, layout = random_predictor(config), cache.layout
    heads, head_dim, batch = config.num_heads, config.head_dim, cache.batch
    q = random_array((batch, heads, head_dim), jnp.float32, "device", 1)
    # In a step they come with the window's kernel.
    window_lse, window_scores = (
        random_array((batch, heads, *rest), jnp.float32, "device", 2) for rest in ((), (3,))
    )
    layers = range(min(_LAYERS, config.num_layers))
    by_layer = [(cache.window_k[i], cache.sketch[i]) for i in layers]
    known = by_layer, window_lse, window_scores, cache.lengths

    def chain(
        q: jax.Array, known: Any, policy: Any, split: Any, *, predict: bool, cut: bool
    ) -> jax.Array:
        by_layer, window_lse, window_scores, lengths = known
        held = host_tokens(layout, lengths)
        host_blocks = held // BLOCK_TOKENS

        def plan_layer(q: jax.Array, layer: int) -> jax.Array:
            window_k, sketch = by_layer[layer]
            features = Features(
                q,
                window_out=q,
                window_lse=window_lse,
                layer=layer,
                num_kv_heads=config.num_kv_heads,
                layout=layout,
                scale=head_dim**-0.5,
                capacity_blocks=cache.num_host_blocks,
                host_tokens=held,
                window_k=window_k,
                window_positions=lengths[:, None] - jnp.arange(window_k.shape[2]),
                sketch=sketch,
                window_scores=window_scores,
            )
            plan = policy.plan(features, lengths + 1) if predict else _planned_already(features)
            used: Any = plan.budget_tokens
            if cut:
                boundary = divide(plan, host_blocks, host_blocks < 0, split, layout).boundary
                used = used + jnp.repeat(boundary, heads // config.num_kv_heads, axis=1)
            # Each needs the one before.
            return q + 1e-12 * (used + plan.granularity.sum())[..., None]

        def step(_: int, q: jax.Array) -> jax.Array:
            return functools.reduce(plan_layer, layers, q)

        return jax.lax.fori_loop(0, _LOOPS, step, q)

    program = jax.jit(chain, static_argnames=("predict", "cut"))

    loops = _LOOPS * len(layers)

    def seconds(predict: bool, cut: bool) -> list[float]:
        def run() -> Any:
            return jax.block_until_ready(
                program(q, known, policy, adaptive(), predict=predict, cut=cut)
            )

        if jax.default_backend() != "gpu":
            return [s / loops for s in time_calls(run, _REPETITIONS)]
        run()
        return [idle_share(run)["working_s"] / loops for _ in range(_REPETITIONS)]

    loop_s = float(np.median(seconds(False, False)))
    alone, with_split = seconds(True, False), seconds(True, True)
    return {
        "plan": [s - loop_s for s in alone],
        "split": [float(np.median(with_split) - np.median(alone))],
    }


def _planned_already(features: Features) -> Plan:
    """A plan that takes no time, and that no compiler can know."""
    numbers = features.q[..., 0].astype(jnp.int32)
    kv_heads = numbers[:, : features.num_kv_heads]
    return Plan(granularity=kv_heads, budget_tokens=numbers, shared=kv_heads < 0)
