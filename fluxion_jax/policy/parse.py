"""Policies by name, as the command line and the result files write them."""

from __future__ import annotations

import jax

from fluxion_jax.errors import ConfigError
from fluxion_jax.policy.fixed_policy import fixed, full
from fluxion_jax.policy.oracle_policy import oracle
from fluxion_jax.policy.protocol import Policy
from fluxion_jax.policy.replay_policy import replay

GRAMMAR = (
    "'full', 'fixed:GRANULARITY:FRACTION', 'fixed:GRANULARITY:FRACTION:group', 'replay:FILE' or "
    "'oracle:TOLERANCE', for example 'fixed:16:0.05'"
)


def parse_policy(policy: str | Policy) -> Policy:
    """Turns a policy's name into the policy; returns a policy unchanged.

    Args:
      policy: a name such as `"full"`, `"fixed:16:0.05"`, `"fixed:32:0.02:group"`,
        `"replay:plans.npz"` or `"oracle:0.1"`, or an object with a `plan` method.

    Raises:
      ConfigError: the text is not a policy, or a value in it is out of range.
      IntegrityError: the file to replay holds something else.
    """
    if not isinstance(policy, str):
        if isinstance(policy, Policy):
            if any(leaf is policy for leaf in jax.tree.leaves(policy)):
                raise ConfigError(
                    f"expected a policy that is a pytree, got {type(policy).__name__}; decorate "
                    "its class with jax.tree_util.register_dataclass to change its numbers "
                    "without recompiling, or with jax.tree_util.register_static"
                )
            return policy
        raise ConfigError(
            f"expected a policy name or an object with a plan method, got {type(policy).__name__}"
        )
    name, *fields = policy.split(":")
    if name == "full" and not fields:
        return full()
    if name == "replay" and policy != "replay:":
        return replay(policy.partition(":")[2])
    if name == "fixed" and len(fields) in (2, 3) and fields[2:] in ([], ["group"]):
        try:
            granularity_tokens, budget_fraction = int(fields[0]), float(fields[1])
        except ValueError:
            raise ConfigError(f"expected numbers in {policy!r}; write {GRAMMAR}") from None
        return fixed(granularity_tokens, budget_fraction, per_group=len(fields) == 3)
    if name == "oracle" and len(fields) == 1:
        try:
            tolerance = float(fields[0])
        except ValueError:
            raise ConfigError(f"expected a number in {policy!r}; write {GRAMMAR}") from None
        return oracle(tolerance)
    raise ConfigError(f"expected {GRAMMAR}; got {policy!r}")
