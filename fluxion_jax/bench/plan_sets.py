"""Plans that `fluxion bench policy` replays, and how far the heads of a group agree in them.

A plan set says what each head needs: budgets at all granularities, of real heads or made up to the
paper's figures. For a model, contexts and a place of the summaries it becomes a granularity per
group (the selector's rule: fewest bytes) and a budget per head.

Random keys would make the selections of a group's heads nearly disjoint, which real heads' are not.
So the blocks that a group reads together are fixed beforehand: the *union factor*, blocks of the
union over blocks of the largest head, 1 to G. A group's union is `factor * largest budget`, at most
the sum of the budgets, and is dealt out to its reading heads in whole units, each head ranking
for itself; where their selections happen to meet, all shares are raised until the union that was
measured is the wanted one. A baseline gets the same treatment with the same factor. What this
leaves out is arithmetic alone: a block is attended by fewer heads than in reality, on both sides.

Axes: D granularities, T recorded steps, L layers, N query heads, K KV heads, G = N // K, B batch,
S steps.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from fluxion_jax.cache.layout import GRANULARITIES_TOKENS, KVLayout, host_tokens
from fluxion_jax.errors import ConfigError, IntegrityError
from fluxion_jax.models.config import ModelConfig
from fluxion_jax.policy.selector import _DEVICE_ADVANTAGE

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Contexts = tuple[int, ...]

FOLDER = Path(__file__).parent / "plans"
KEYS = (
    "description", "kv_heads", "granularities", "recordings", "union_factor",
    "fixed_union_factor", "fit", "length_tokens", "budget_tokens",
)  # fmt: skip


def cheapest(
    budget_tokens: Integers, held: Integers, layout: KVLayout
) -> tuple[Integers, Integers]:
    """The selector's choice (`policy.selector`) in NumPy, for any leading axes.

    Args:
      budget_tokens: `[..., N, D]`.
      held: tokens that the host holds, `[...]`.
      layout: of the cache; its KV heads need not be those of the budgets' model.

    Returns:
      `(index of the granularity [..., K], budget_tokens [..., N])`, the latter in whole units.
    """
    sizes = np.asarray(GRANULARITIES_TOKENS)
    held = np.asarray(held)[..., None, None]
    wanted = -(-np.minimum(budget_tokens, held) // sizes) * sizes
    groups = (*wanted.shape[:-2], layout.num_kv_heads, -1, len(sizes))
    read = np.minimum(wanted.reshape(groups).sum(axis=-2), held)
    units = np.where(read > 0, -(-held // sizes), 0)
    summary = 2 * (_DEVICE_ADVANTAGE if layout.summaries == "host" else 1)
    cost = units * summary + read * 2 * layout.jax_dtype.itemsize * _DEVICE_ADVANTAGE
    best = len(sizes) - 1 - np.argmin(cost[..., ::-1], axis=-1)
    per_head = np.repeat(best, wanted.shape[-2] // layout.num_kv_heads, axis=-1)
    return best, np.take_along_axis(wanted, per_head[..., None], axis=-1)[..., 0]


def fit_growth(mean_budgets: Mapping[int, Floats]) -> dict[str, Any]:
    """Fits `budget = scale * context ** exponent` by least squares of logarithms.

    Args:
      mean_budgets: by length in tokens, `[L, N]` of each head's mean budget in tokens.

    Returns:
      JSON-ready: `scale` and `exponent` of the mean over all heads, `residual_log2` of that fit
      (root mean square), and `head_exponent` `[L, N]`: of each head's own fit, kept within 0 and 1,
      and the common one for heads that need nothing at one of the lengths.
    """
    lengths = np.asarray(sorted(mean_budgets))
    x = np.log2(lengths)
    values = np.stack([mean_budgets[length] for length in lengths])
    y = np.log2(values.mean(axis=(1, 2)))
    exponent, offset = np.polyfit(x, y, 1)
    residual = y - (exponent * x + offset)
    known = (values > 0).all(axis=0)
    safe = np.log2(np.where(known, values, 1.0))
    centred = x - x.mean()
    slopes = np.tensordot(centred, safe, axes=1) / (centred**2).sum()
    heads = np.where(known, np.clip(slopes, 0.0, 1.0), np.clip(exponent, 0.0, 1.0))
    return {
        "scale": float(2.0**offset),
        "exponent": float(exponent),
        "residual_log2": float(np.sqrt((residual**2).mean())),
        "head_exponent": np.round(heads, 3).tolist(),
    }


class Target(NamedTuple):
    """What is planned, before a group's union is imposed.

    Attributes:
      granularity: int64 `[B, S, L, K]`, tokens of a unit.
      budget_tokens: int64 `[B, S, L, N]`, in whole units.
    """

    granularity: Integers
    budget_tokens: Integers


@dataclasses.dataclass(frozen=True)
class Paper:
    """A plan set made up to the paper's figures.

    Whole groups stream or read; which ones is drawn once, as is the base budget of each reading
    group (log-normal, a spread of half a unit of the natural logarithm). Heads of a group have the
    same budget, so that its union can have any factor from 1 to G. Budgets grow by half of that at
    16 tokens with each doubling of the unit (heads of SmolLM2 at tolerance 0.2: 1.7, 2.4, 3.6 and
    4.5 % of the context). The selector's rule chooses the unit; then all budgets are scaled to the
    wanted mean.

    Attributes:
      retrieval_fraction: share of the groups that read at all.
      mean_fraction: mean budget as a share of the context, of `mean_over`.
      union_factor: see the module's text.
      mean_over: `"reading"` heads, or `"all"` heads, with 0 for those that stream.
    """

    retrieval_fraction: float = 0.25
    mean_fraction: float = 0.02
    union_factor: float = 2.0
    mean_over: Literal["reading", "all"] = "reading"

    def describe(self) -> str:
        """One line for a report."""
        return (
            f"{self.retrieval_fraction:.0%} of the groups read, mean budget of "
            f"{self.mean_over} heads {100 * self.mean_fraction:g} % of the context, union factor "
            f"{self.union_factor:g}"
        )

    def target(
        self, config: ModelConfig, layout: KVLayout, context: Contexts, steps: int
    ) -> Target:
        """The same plan in every step."""
        layers, kv_heads = config.num_layers, config.num_kv_heads
        rng = np.random.default_rng(0)
        order = rng.permutation(layers * kv_heads).reshape(layers, kv_heads)
        reads = order < round(self.retrieval_fraction * layers * kv_heads)
        base = np.where(reads, np.exp(0.5 * rng.standard_normal(reads.shape)), 0.0)
        base *= reads.sum() / base.sum()
        mean = self.mean_fraction
        if self.mean_over == "all":
            mean *= reads.size / reads.sum()
        growth = 1.0 + 0.5 * np.arange(len(GRANULARITIES_TOKENS))
        group = config.num_heads // kv_heads
        per_head = np.repeat(base, group, axis=1)[..., None] * growth
        granularity, budgets = [], []
        for tokens in context:
            held = np.asarray(host_tokens(layout, tokens))
            wanted = np.ceil(per_head * mean * tokens).astype(np.int64)
            best, chosen = cheapest(wanted, held, layout)
            sizes = np.asarray(GRANULARITIES_TOKENS)[best]
            of_reading = chosen[chosen > 0].mean()
            per_unit = np.repeat(sizes, group, axis=1)
            scaled = chosen * (mean * tokens / of_reading) / per_unit
            budgets.append(np.where(chosen > 0, np.maximum(np.round(scaled), 1), 0) * per_unit)
            granularity.append(sizes)
        return Target(*(_every_step(x, steps) for x in (granularity, budgets)))


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A plan set of real heads, written by `tools/record_plans.py`.

    A larger model gets the recorded layers stretched over its depth; groups, and the heads of a
    group, repeat. Copies replay other recorded steps, so that they do not move in step; the steps
    of a row are those from its own on, over and over. Budgets at the longest recorded length are
    scaled by `(context / length) ** exponent` with each head's fitted exponent.

    Attributes:
      name: of the file, without its ending.
      document: what the file holds.
      union_factor: as measured with the recorded budgets on the real heads.
    """

    name: str
    document: dict[str, Any]
    union_factor: float

    def describe(self) -> str:
        """One line for a report."""
        fit = self.document["fit"]
        lengths = ", ".join(str(r["length_tokens"]) for r in self.document["recordings"])
        return (
            f"{self.document['description']}; recorded at {lengths} tokens; mean budget over "
            f"heads and units fits {fit['scale']:.3g} * context ** {fit['exponent']:.3f} (residual "
            f"{fit['residual_log2']:.2f} in log2); union factor {self.union_factor:.3g}, of "
            f"fixed:16:0.05 on the same heads {self.document['fixed_union_factor']:.3g}"
        )

    def target(
        self, config: ModelConfig, layout: KVLayout, context: Contexts, steps: int
    ) -> Target:
        """The recorded steps, as the class's text says."""
        recorded = np.asarray(self.document["budget_tokens"], np.float64)
        exponent = np.asarray(self.document["fit"]["head_exponent"])
        total, layers, heads, _ = recorded.shape
        kv_heads = self.document["kv_heads"]
        of_layer = np.arange(config.num_layers) * layers // config.num_layers
        kv = np.arange(config.num_kv_heads)
        group, recorded_group = config.num_heads // config.num_kv_heads, heads // kv_heads
        in_group = np.arange(group) % recorded_group
        head = (kv % kv_heads * recorded_group)[:, None] + in_group
        # How often the same recorded group was taken before.
        copy = np.arange(config.num_layers)[:, None] - np.searchsorted(of_layer, of_layer)[:, None]
        copy = copy * -(-config.num_kv_heads // kv_heads) + kv // kv_heads
        granularity, budgets = [], []
        for row, tokens in enumerate(context):
            held = np.asarray(host_tokens(layout, tokens))
            # An odd stride meets all steps of an even number of them.
            step = (np.arange(steps)[:, None, None] + 3 * row + 5 * copy) % total
            taken = recorded[step[..., None], of_layer[:, None, None], head]
            scale = (tokens / self.document["length_tokens"]) ** exponent[
                of_layer[:, None, None], head
            ]
            wanted = np.ceil(taken * scale[..., None]).astype(np.int64)
            best, chosen = cheapest(
                wanted.reshape(steps, config.num_layers, config.num_heads, -1), held, layout
            )
            granularity.append(np.asarray(GRANULARITIES_TOKENS)[best])
            budgets.append(chosen)
        return Target(np.stack(granularity), np.stack(budgets))


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A baseline: 16-token units and the same budget for every head.

    Attributes:
      fraction: budget as a share of the context.
      union_factor: see the module's text.
    """

    fraction: float = 0.05
    union_factor: float = 1.0

    def target(
        self, config: ModelConfig, layout: KVLayout, context: Contexts, steps: int
    ) -> Target:
        """The same plan in every layer and step."""
        del layout
        unit = GRANULARITIES_TOKENS[0]
        groups = (config.num_layers, config.num_kv_heads)
        heads = (config.num_layers, config.num_heads)
        wanted = [math.ceil(round(self.fraction * t, 6) / unit) * unit for t in context]
        return Target(
            _every_step([np.full(groups, unit)] * len(context), steps),
            _every_step([np.full(heads, tokens) for tokens in wanted], steps),
        )


PlanSet = Paper | Recorded | Fixed


def recorded(name: str, folder: Path = FOLDER) -> Recorded:
    """A plan set of the package.

    Args:
      name: of a file in `fluxion_jax/bench/plans`, without its ending.
      folder: of other files.

    Raises:
      ConfigError: there is no such file.
      IntegrityError: it lacks something.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        known = sorted(p.stem for p in folder.glob("*.json"))
        raise ConfigError(f"expected recorded plans out of {known}, got {name!r}; name one of them")
    document = json.loads(path.read_text(encoding="utf-8"))
    if missing := set(KEYS) - set(document):
        raise IntegrityError(
            f"expected recorded plans in {path}, got none of {sorted(missing)}; record them again "
            "with tools/record_plans.py"
        )
    return Recorded(name, document, document["union_factor"])


class Imposed(NamedTuple):
    """Budgets with which the union of a group is what it should be.

    Attributes:
      budget_tokens: int32 `[B, S, L, N]`.
      union_tokens: int64 `[B, S, L, K]`, what the union should be, in whole units.
    """

    budget_tokens: npt.NDArray[np.int32]
    union_tokens: Integers


def impose(target: Target, factor: float, held: Integers, raised: float = 1.0) -> Imposed:
    """Deals a group's union out to its reading heads; see the module's text.

    Args:
      target: the plan.
      factor: union over largest head; a union is at most the sum of the heads' budgets, and at
        least the largest.
      held: int64 `[B]`, tokens that the host holds of each row.
      raised: by how much more is dealt out than the union, to make up for what heads select twice.
    """
    granularity = target.granularity
    grouped = target.budget_tokens.reshape(*granularity.shape, -1)
    available = -(-held[:, None, None, None] // granularity)
    union = np.minimum(factor * grouped.max(axis=-1), grouped.sum(axis=-1))
    units = np.minimum(np.ceil(union / granularity).astype(np.int64), available)
    dealt = np.ceil(units * raised).astype(np.int64)[..., None]
    reads = grouped > 0
    readers = np.maximum(reads.sum(axis=-1, keepdims=True), 1)
    place = np.cumsum(reads, axis=-1) - 1
    own = np.where(reads, dealt // readers + (place < dealt % readers), 0)
    own = np.minimum(own, available[..., None]) * granularity[..., None]
    return Imposed(
        own.reshape(target.budget_tokens.shape).astype(np.int32),
        units * granularity,
    )


def statistics(target: Target, imposed: Imposed, context: Contexts) -> dict[str, Any]:
    """What a plan is like, JSON-ready: shares of groups that read, of units, of the context."""
    reads = imposed.union_tokens > 0
    grouped = target.budget_tokens.reshape(*reads.shape, -1)
    length = np.asarray(context)[:, None, None, None]
    shares = (grouped / length[..., None]).mean(axis=-1)
    largest = grouped.max(axis=-1)
    return {
        "reading_groups": float(reads.mean()),
        "budget_of_reading": float(shares[reads].mean()) if reads.any() else 0.0,
        "budget_of_all": float(shares.mean()),
        "granularities": {
            str(g): float((target.granularity[reads] == g).mean()) if reads.any() else 0.0
            for g in GRANULARITIES_TOKENS
        },
        "union_factor": float(imposed.union_tokens.sum() / max(largest.sum(), 1)),
    }


def _every_step(of_rows: list[npt.NDArray[Any]], steps: int) -> Integers:
    """`[B, S, ...]` of the same array for every step of a row."""
    stacked = np.stack(of_rows).astype(np.int64)[:, None]
    return np.broadcast_to(stacked, (stacked.shape[0], steps, *stacked.shape[2:]))
