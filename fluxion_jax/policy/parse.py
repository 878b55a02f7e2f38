"""Policies by name, as the command line and the result files write them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from fluxion_jax.errors import ConfigError
from fluxion_jax.policy.fixed_policy import fixed, full
from fluxion_jax.policy.fluxion_policy import DEFAULT_TOLERANCE
from fluxion_jax.policy.oracle_policy import oracle
from fluxion_jax.policy.protocol import Policy
from fluxion_jax.policy.replay_policy import replay

GRAMMAR = (
    "'full', 'fluxion', 'fluxion:tolerance=T', 'fluxion:weights=DIR', "
    "'fixed:GRANULARITY:FRACTION', 'fixed:GRANULARITY:FRACTION:group', 'replay:FILE' or "
    "'oracle:TOLERANCE', for example 'fixed:16:0.05'"
)


class _FluxionName(NamedTuple):
    """What `fluxion:tolerance=T:weights=DIR` says."""

    tolerance: float | None
    folder: str | None


def check_policy(policy: str) -> None:
    """Checks a policy's name as far as that is possible without the model.

    Raises:
      ConfigError: the text is not a policy, or a value in it is out of range.
      IntegrityError: the file to replay holds something else.
    """
    if _fluxion_name(policy) is None:
        parse_policy(policy)


def parse_policy(policy: str | Policy, model: Any = None) -> Policy:
    """Turns a policy's name into the policy; returns a policy unchanged.

    Args:
      policy: a name such as `"full"`, `"fluxion"`, `"fluxion:tolerance=0.1"`, `"fixed:16:0.05"`,
        `"fixed:32:0.02:group"`, `"replay:plans.npz"` or `"oracle:0.1"`, or an object with a `plan`
        method.
      model: the model that it is for, loaded; `fluxion` looks for the weights calibrated for it.

    Returns:
      The policy.

    Raises:
      ConfigError: the text is not a policy, a value in it is out of range, or there are no
        calibrated weights for the model.
      IntegrityError: the file to replay, or the calibrated weights, hold something else.

    Example:
      >>> import fluxion_jax as fx
      >>> fx.parse_policy("fixed:16:0.05").budget_fraction
      array(0.05, dtype=float32)
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
    fluxion = _fluxion_name(policy)
    if fluxion is not None:
        if model is None:
            raise ConfigError(
                f"expected a model for the policy {policy!r}, whose weights belong to one model, "
                "got none; call parse_policy(name, model)"
            )
        # Orbax takes a second to import, and only this policy needs it.
        from fluxion_jax.calibration.storage import policy_of

        return policy_of(model, *fluxion)
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


def _fluxion_name(policy: str) -> _FluxionName | None:
    """The parts of a name that begins with `fluxion`, None for others; a path comes last."""
    name, *_ = policy.split(":")
    if name != "fluxion":
        return None
    fields, has_folder, folder = policy.partition(":weights=")
    tolerance: float | None = None
    _, *options = fields.split(":")
    try:
        if len(options) > 1 or (has_folder and not folder):
            raise ValueError
        for option in options:
            key, _, value = option.partition("=")
            if key != "tolerance":
                raise ValueError
            tolerance = float(value)
    except ValueError:
        raise ConfigError(f"expected {GRAMMAR}; got {policy!r}") from None
    if tolerance is not None and not tolerance > 0.0:
        raise ConfigError(
            f"expected a tolerance above 0, got {tolerance}; {DEFAULT_TOLERANCE} is the default"
        )
    return _FluxionName(tolerance, folder or None)
