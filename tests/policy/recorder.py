"""A policy that hands through what policies see."""

from __future__ import annotations

import dataclasses

import jax

from fluxion_jax.policy.features import head_features
from fluxion_jax.policy.protocol import Features, Plan, Policy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FeatureRecorder:
    """Plans like another policy and hands the features through as the plan's notes."""

    policy: Policy

    def plan(self, features: Features, lengths: jax.Array) -> Plan:
        return self.policy.plan(features, lengths)._replace(notes=head_features(features))
