"""Evaluation: seeded long-context tasks and the measures that tell a good policy from a bad one."""

from fluxion_jax.evaluation.metrics import METRICS as METRICS
from fluxion_jax.evaluation.runner import Settings as Settings
from fluxion_jax.evaluation.runner import evaluate as evaluate
from fluxion_jax.evaluation.samples import Sample as Sample
from fluxion_jax.evaluation.samples import Task as Task
from fluxion_jax.evaluation.tasks import TASKS as TASKS
from fluxion_jax.evaluation.tasks import make_sample as make_sample
