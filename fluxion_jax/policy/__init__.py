"""Policies decide what to read; the split decides who reads it."""

from fluxion_jax.policy.cost_model import CostModel as CostModel
from fluxion_jax.policy.fixed_policy import FixedPolicy as FixedPolicy
from fluxion_jax.policy.fixed_policy import fixed as fixed
from fluxion_jax.policy.fixed_policy import full as full
from fluxion_jax.policy.parse import parse_policy as parse_policy
from fluxion_jax.policy.protocol import Features as Features
from fluxion_jax.policy.protocol import Plan as Plan
from fluxion_jax.policy.protocol import Policy as Policy
from fluxion_jax.policy.replay_policy import ReplayPolicy as ReplayPolicy
from fluxion_jax.policy.replay_policy import replay as replay
from fluxion_jax.policy.split import Split as Split
from fluxion_jax.policy.split import modelled as modelled
from fluxion_jax.policy.split import one_sided as one_sided
from fluxion_jax.policy.split import parse_split as parse_split
from fluxion_jax.policy.split import split_at as split_at
