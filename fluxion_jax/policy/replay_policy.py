"""Replayed plans: what was decided elsewhere, step by step, for instance by an oracle."""

from __future__ import annotations

import dataclasses
import hashlib
import zlib
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from fluxion_jax.cache.layout import GRANULARITIES_TOKENS, KVLayout
from fluxion_jax.errors import ConfigError, IntegrityError, require_path
from fluxion_jax.policy.protocol import Features, Plan
from fluxion_jax.whole_files import replaced

_NAMES = ("first_position", "granularity", "budget_tokens")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReplayPolicy:
    """Plans by row, position and layer; build it with `replay`.

    Axes: R rows (1 serves any batch), S recorded steps, L layers of the model (what stands for a
    sliding one is not looked at), K KV heads, N query heads.

    Attributes:
      first_position: int32 `[R]`, position of the token of the first recorded step; tokens before
        it replay the first step, those behind the recording its last.
      granularity: int32 `[R, S, L, K]`, tokens of a unit.
      budget_tokens: int32 `[R, S, L, N]`.
    """

    first_position: jax.Array | np.ndarray
    granularity: jax.Array | np.ndarray
    budget_tokens: jax.Array | np.ndarray

    def plan(self, features: Features, lengths: jax.Array) -> Plan:
        """Plans as recorded; see `Policy.plan`.

        Raises:
          ConfigError: the recording is of another model or of another batch.
        """
        batch, num_heads, _ = features.q.shape
        rows, steps, *groups = self.granularity.shape
        model = features.layout.num_layers, features.num_kv_heads, num_heads
        recorded = (*groups, self.budget_tokens.shape[-1])
        # A gather would replay the last layer for those behind it, and say nothing.
        if recorded != model:
            raise ConfigError(
                "expected a recording of a model with {} layers, {} KV heads and {} query heads, "
                "got one with {}, {} and {}; record this model".format(*model, *recorded)
            )
        if rows not in (1, batch):
            raise ConfigError(
                f"expected a recording of 1 row or of {batch}, got {rows}; record this batch"
            )
        row = jnp.arange(batch) if rows == batch else jnp.zeros(batch, jnp.int32)
        step = jnp.clip(lengths - 1 - jnp.asarray(self.first_position)[row], 0, steps - 1)
        granularity = jnp.asarray(self.granularity)[row, step, features.layer]
        return Plan(
            granularity=granularity,
            budget_tokens=jnp.asarray(self.budget_tokens)[row, step, features.layer],
            shared=jnp.zeros(granularity.shape, bool),
        )

    def save(self, path: str | Path) -> None:
        """Writes a file that `replay:FILE` reads, in NumPy's format `.npz` whatever its name is.

        Args:
          path: exactly the file that is written; its folder must exist.

        Raises:
          OSError: the file cannot be written.
        """
        require_path(path, "the file to write")
        with replaced(Path(path).expanduser()) as file:
            np.savez_compressed(
                file,
                first_position=np.asarray(self.first_position),
                granularity=np.asarray(self.granularity),
                budget_tokens=np.asarray(self.budget_tokens),
            )

    def __str__(self) -> str:
        digest = hashlib.sha256()
        for name in _NAMES:
            digest.update(np.ascontiguousarray(getattr(self, name)).tobytes())
        return f"replay:{digest.hexdigest()[:8]}"


def recorded_plans(
    layout: KVLayout,
    first_positions: npt.NDArray[np.integer[Any]],
    granularity: npt.NDArray[np.int32],
    budget_tokens: npt.NDArray[np.int32],
) -> ReplayPolicy:
    """Makes a policy of plans that were recorded for the layers with a host cache.

    Args:
      layout: of the cache.
      first_positions: int `[R]`, position of the token of each row's first step.
      granularity: int32 `[R, S, global layers, K]`; 0 in steps in which a row took no part.
      budget_tokens: int32 `[R, S, global layers, N]`.
    """
    layers = np.asarray(layout.global_layers)
    # Sliding layers are never asked about.
    of = np.searchsorted(layers, np.arange(layout.num_layers)).clip(max=len(layers) - 1)
    granularity = np.where(granularity > 0, granularity, GRANULARITIES_TOKENS[-1])
    return ReplayPolicy(
        np.asarray(first_positions, np.int32),
        granularity[:, :, of].astype(np.int32),
        budget_tokens[:, :, of].astype(np.int32),
    )


def replay(path: str | Path) -> ReplayPolicy:
    """Reads recorded plans.

    Args:
      path: what `ReplayPolicy.save` wrote.

    Raises:
      ConfigError: no such file.
      IntegrityError: it holds something else.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ConfigError(f"expected a file of recorded plans, got {path}; check the path")
    try:
        loaded = np.load(path)
        if isinstance(loaded, np.ndarray):
            raise IntegrityError(
                f"expected recorded plans in {path}, got one array of shape {loaded.shape}; name a "
                "file that ReplayPolicy.save wrote"
            )
        with loaded as file:
            first, granularity, budget = (file[name] for name in _NAMES)
    except (BadZipFile, KeyError, ValueError, EOFError, zlib.error) as error:
        raise IntegrityError(f"expected recorded plans in {path}, got: {error}") from error
    shapes = first.shape, granularity.shape[:3], budget.shape[:3]
    fits = len(granularity.shape) == len(budget.shape) == 4 and shapes[1] == shapes[2]
    if (
        not fits
        or any(not np.issubdtype(x.dtype, np.integer) for x in (first, granularity, budget))
        or shapes[0] != shapes[1][:1]
        or not np.isin(granularity, GRANULARITIES_TOKENS).all()
    ):
        raise IntegrityError(
            "expected integer arrays [R], [R, S, L, K] of granularities and [R, S, L, N] in "
            f"{path}, got {first.shape}, {granularity.shape} and {budget.shape}; record it again"
        )
    return ReplayPolicy(*(x.astype(np.int32) for x in (first, granularity, budget)))
