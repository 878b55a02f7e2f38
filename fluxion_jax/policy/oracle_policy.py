"""The oracle as a value: the smallest budgets within a tolerance, known only with hindsight.

What an oracle plans needs the attention to everything, which a decode step exists to avoid. So only
the evaluation from a shared prefix, which has all keys on the device, can run it.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from fluxion_jax.errors import ConfigError, UnsupportedError
from fluxion_jax.policy.protocol import Features, Plan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OraclePolicy:
    """The smallest budget of each head within a tolerance; build it with `oracle`.

    Attributes:
      tolerance: float32 scalar, of the error of a head's output over the step's largest.
    """

    tolerance: jax.Array | np.ndarray

    def plan(self, features: Features, lengths: jax.Array) -> Plan:
        """Refuses: see the module's text.

        Raises:
          UnsupportedError: always.
        """
        raise UnsupportedError(
            "expected a policy that plans from a step's features, got an oracle, which needs the "
            "attention to everything; run fluxion evaluate --shared-prefix, or replay its labels"
        )

    def __str__(self) -> str:
        return f"oracle:{float(self.tolerance):.6g}"


def oracle(tolerance: float) -> OraclePolicy:
    """The smallest budget of each head within a tolerance.

    Args:
      tolerance: of the error of a head's output over the step's largest (paper, section 3.1), above
        0.

    Raises:
      ConfigError: the tolerance is not above 0.
    """
    if not tolerance > 0:
        raise ConfigError(f"expected a tolerance above 0, got {tolerance}; allow some error")
    return OraclePolicy(np.asarray(tolerance, np.float32))
