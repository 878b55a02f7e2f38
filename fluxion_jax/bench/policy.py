"""`fluxion bench policy`: plans per head against fixed policies, at the shapes of large models.

Weights and caches are random, as in `fluxion bench step`; plans are replayed while a predictor
executes (`replayed`), and the union of a group's selections is imposed on both sides (`plan_sets`).
For each model, contexts, batch and place of the summaries one program runs all plan sets, and one
without a predictor all baselines; whose plans, which split and which cost model are data.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fluxion_jax.bench import machine, plan_sets, roundtrip
from fluxion_jax.bench.cells import Cells
from fluxion_jax.bench.idle import idle_share
from fluxion_jax.bench.plan_sets import Fixed, Imposed, Paper, PlanSet, Target, impose
from fluxion_jax.bench.replayed import Replayed, planning_s, random_predictor
from fluxion_jax.bench.stamp import stamp
from fluxion_jax.bench.statistics import summarise
from fluxion_jax.bench.step import measured_cost, rates_gb_s
from fluxion_jax.bench.step_programs import (
    CHUNK_STEPS,
    LLAMA_8B,
    QWEN_7B,
    Selection,
    Stepper,
    dense_floor,
    random_cache,
    random_weights,
    selection_s,
)
from fluxion_jax.bench.step_report import costs
from fluxion_jax.cache.layout import BLOCK_TOKENS, host_tokens
from fluxion_jax.models.config import ModelConfig
from fluxion_jax.policy import CostModel, ReplayPolicy, Split, adaptive
from host_ops import native

PAPER_LIKE = "paper-like"
# The same with the mean over all heads: four times as much in each reading head.
PAPER_LIKE_ALL = "paper-like-all"
OURS = ("recall-12m",)
PER_HEAD, GROUP = "fixed:16:0.05", "fixed:16:0.05:group"
SPLITS = ("adaptive", "host", "device")

_UNION_STEPS = 8
_UNION_TRIES = 4
_UNION_TOLERANCE = 0.01
# A rate that no machine has, so that one side gets everything whatever was measured.
_NEVER, _ALWAYS = 1.0, 1e15
_RECOVERY_STEPS = 40
_STEADY_STEPS = 10
_RECOVERED = 1.05


@dataclasses.dataclass(frozen=True)
class Case:
    """One model and its batch.

    Attributes:
      model: a name in `Settings.models`.
      context_tokens: of each row.
      sets: plan sets, the first of which everything else is measured with.
      curve: further plan sets, of a curve.
      details: whether to measure splits, GPU idle and recovery, too.
      places: of the summaries, for the plan sets.
    """

    model: str
    context_tokens: tuple[int, ...]
    sets: tuple[str, ...] = (PAPER_LIKE, *OURS)
    curve: tuple[str, ...] = ()
    details: bool = False
    places: tuple[str, ...] = ("device",)

    @property
    def name(self) -> str:
        """Part of a file name."""
        contexts = sorted(set(self.context_tokens))
        span = "-".join(str(c) for c in (contexts[0], contexts[-1])[: len(contexts)])
        return f"{self.model}-{span}-b{len(self.context_tokens)}"


_MACHINE = machine.Settings(repetitions=3, roundtrip_layers=None)
_ROUNDTRIP = roundtrip.Settings((8, 24), 30)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      models: configurations by name.
      cases: in the order in which they are measured.
      calls: timed calls of a chunk of steps.
      machine: how the ceilings are measured.
      roundtrip: how the hand-over is measured.
    """

    models: dict[str, ModelConfig]
    cases: tuple[Case, ...]
    calls: int = 5
    machine: machine.Settings = _MACHINE
    roundtrip: roundtrip.Settings = _ROUNDTRIP


_MODELS = {"llama-3.1-8b": LLAMA_8B, "qwen2.5-7b": QWEN_7B}
_HEADLINE = (PAPER_LIKE, *OURS)
_CURVE = (
    *(f"paper:{share}:0.02:2" for share in (0.1, 0.5, 0.75)),
    *(f"paper:0.25:0.02:{factor}" for factor in (1, 3, 4)),
)
_RAGGED = (8192, 16384, 32768, 65536)
QUICK = Settings(
    _MODELS,
    tuple(Case("llama-3.1-8b", (s,) * 4, _HEADLINE) for s in (32768, 131072)),
    calls=3,
)
FULL = Settings(
    _MODELS,
    (
        *(
            Case("llama-3.1-8b", (s,) * 4, (*_HEADLINE, PAPER_LIKE_ALL), curve, True)
            for s, curve in ((32768, _CURVE), (131072, ()))
        ),
        *(Case("qwen2.5-7b", (s,) * 4) for s in (32768, 131072)),
        Case("llama-3.1-8b", _RAGGED, places=("device", "host")),
        *(Case("llama-3.1-8b", (32768,) * b) for b in (1, 8)),
        Case("llama-3.1-8b", (131072,)),
        Case("llama-3.1-8b", (65536,) * 4),
    ),
)


def plan_set(name: str) -> Paper | plan_sets.Recorded:
    """A plan set by name: `paper-like`, `paper-like-all`, `paper:GROUPS:BUDGET:FACTOR`, or a file.

    Raises:
      ConfigError: there is no such plan set.
    """
    if name == PAPER_LIKE:
        return Paper()
    if name == PAPER_LIKE_ALL:
        return Paper(mean_over="all")
    if name.startswith("paper:"):
        retrieval, mean, factor = (float(x) for x in name.split(":")[1:])
        return Paper(retrieval, mean, factor)
    return plan_sets.recorded(name)


def run(
    settings: Settings = QUICK,
    folder: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
    *,
    budget_s: float | None = None,
) -> dict[str, Any]:
    """Measures the ceilings, the parts that a step is modelled from, and the steps.

    Args:
      settings: what is measured.
      folder: where finished cells are kept and looked for; None keeps nothing.
      say: told in one line what is measured next.
      budget_s: no further cell is begun after so many seconds; what is missing is named in the
        report and measured by the next run.
    """
    bench = _Bench(settings, folder, say, budget_s)
    ceilings = bench.cell("machine", lambda: machine.run(settings.machine))
    handover = bench.cell("roundtrip", lambda: roundtrip.run(settings.roundtrip))
    rows: list[dict[str, Any]] = []
    if ceilings and handover:
        rates = rates_gb_s(ceilings)
        for case in settings.cases:
            rows += bench.case(case, rates, handover)
    names = {name for case in settings.cases for name in (*case.sets, *case.curve)}
    return {
        "benchmark": "policy",
        "stamp": stamp(),
        "machine": ceilings,
        "roundtrip": handover,
        "plan_sets": {name: plan_set(name).describe() for name in sorted(names)},
        "rows": rows,
        "left_out": bench.left_out,
        "failed": bench.failed,
    }


class _Bench(Cells):
    """Cells, and what they share: weights, caches and programs, made when first needed."""

    def __init__(
        self,
        settings: Settings,
        folder: Path | None,
        say: Callable[[str], None],
        budget_s: float | None,
    ) -> None:
        super().__init__("policy", folder, say, budget_s)
        self.settings = settings
        self.weights = functools.lru_cache(maxsize=1)(self._weights)
        self.predictor = functools.lru_cache(maxsize=1)(self._predictor)
        self.stepper: tuple[tuple[Case, str, bool], Stepper] | None = None

    def after_failure(self) -> None:
        self.stepper = None

    def case(
        self, case: Case, rates: dict[str, float], handover: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """All rows of a case, those that share a program one after the other."""
        measure = _Measure(self, case, rates, handover)
        self.cell(measure.floor_name, measure.floor)
        if measure.floor_name in self.failed:
            # The model time of a step begins with it.
            return []
        sets = {name: plan_set(name) for name in (*case.sets, *case.curve)}
        first = case.sets[0]
        baseline = Fixed()
        rows: list[dict[str, Any] | None] = []
        for place in case.places:
            rows += [measure.row(place, name, plan, True) for name, plan in sets.items()]
            if place == "device":
                rows.append(measure.planning())
            if case.details and place == "device":
                rows.append(measure.idle(place, first, sets[first], True))
        for name, plan in ((GROUP, baseline), (first, sets[first])):
            for split in SPLITS if case.details else SPLITS[:1]:
                rows.append(measure.row("device", name, plan, False, split))
        if case.details:
            rows.append(measure.recovery())
        rows.append(measure.row("host", GROUP, baseline, False))
        for factor in sorted({plan.union_factor for plan in sets.values()}):
            rows.append(measure.row("host", PER_HEAD, Fixed(union_factor=factor), False))
        if case.details:
            factor = sets[first].union_factor
            rows.append(measure.idle("host", PER_HEAD, Fixed(union_factor=factor), False))
        self.stepper = None
        return [row for row in rows if row]

    def stepper_of(self, case: Case, summaries: str, predicts: bool) -> Stepper:
        """Steps of a case over a cache; the keys and values of the one before are taken over."""
        key = (case, summaries, predicts)
        if self.stepper is None or self.stepper[0] != key:
            keep = self.stepper[1].cache if self.stepper and self.stepper[0][0] == case else None
            weights = self.weights(case.model)
            self.say(f"cache of {case.name}, summaries on the {summaries}")
            cache = random_cache(
                weights.config, case.context_tokens, summaries, keep, sketch=predicts
            )
            self.stepper = key, Stepper(weights, cache)
        return self.stepper[1]

    def _weights(self, model: str) -> Any:
        self.say(f"weights of {model}")
        return jax.block_until_ready(random_weights(self.settings.models[model]))

    def _predictor(self, model: str) -> Any:
        return random_predictor(self.settings.models[model])


class _Measure:
    """The rows of one case."""

    def __init__(
        self, bench: _Bench, case: Case, rates: dict[str, float], handover: dict[str, Any]
    ) -> None:
        self.bench, self.case, self.rates, self.handover = bench, case, rates, handover
        self.config = bench.settings.models[case.model]
        self.floor_name = f"{case.name}-floor"

    def row(
        self, place: str, name: str, plan: PlanSet, predicts: bool, split: str = SPLITS[0]
    ) -> dict[str, Any] | None:
        """Steps with these plans, and what they should take."""
        label = f"{name}-union{plan.union_factor:.3g}" if name == PER_HEAD else name
        cell = f"{self.case.name}-{place}-{label}-{split}" + ("-predicted" if predicts else "")
        floor = self.bench.cell(self.floor_name, self.floor)
        found = self.bench.cell(cell, lambda: self._steps(place, name, plan, predicts, split))
        if not floor or not found:
            return None
        # Scoring and selection by the host are part of its time.
        alone: dict[str, Any] | None = {"selection_s": None}
        if place == "device":
            name_of_part = f"{self.case.name}-selection-{label}"
            alone = self.bench.cell(name_of_part, lambda: self._selection(name, plan))
        if not alone:
            return None
        return {**found, **costs(found, floor, alone, self.handover, self.rates, self.config)}

    def planning(self) -> dict[str, Any] | None:
        """What planning and splitting a layer take by themselves."""

        def measure() -> dict[str, Any]:
            stepper = self.bench.stepper_of(self.case, "device", True)
            found = planning_s(self.config, stepper.cache)
            return {"plan_s": summarise(found["plan"]), "split_s": found["split"][0]}

        found = self.bench.cell(f"{self.case.name}-planning-of-layers", measure)
        return found and {"kind": "planning", "case": self.case.name, **found}

    def idle(self, place: str, name: str, plan: PlanSet, predicts: bool) -> dict[str, Any] | None:
        """How much of some steps no kernel runs; on a GPU only."""
        if jax.default_backend() != "gpu":
            return None

        def measure() -> dict[str, Any]:
            stepper, policy, _, _ = self._ready(place, name, plan, predicts, SPLITS[0])
            split = self._split(SPLITS[0])
            stepper.call(policy, split)
            return idle_share(lambda: stepper.call(policy, split, _UNION_STEPS))

        found = self.bench.cell(f"{self.case.name}-{place}-{name}-idle", measure)
        return found and {"kind": "idle", "case": self.case.name, "plan": name, **found}

    def recovery(self) -> dict[str, Any] | None:
        """Steps before and after the host loses about half of its speed."""

        def measure() -> dict[str, Any]:
            stepper, policy, _, _ = self._ready("device", GROUP, Fixed(), False, SPLITS[0])
            threads, slowed = self._half_speed()
            split = self._split(SPLITS[0])
            for _ in range(2):
                stepper.call(policy, split)
            single = functools.partial(stepper.call, policy, split, 1)
            before = [single()[0] for _ in range(_STEADY_STEPS)]
            try:
                native.set_threads(slowed)
                after = [single()[0] for _ in range(_RECOVERY_STEPS)]
            finally:
                native.set_threads(threads)
            steady = float(np.median(after[-_STEADY_STEPS:]))
            recovered = [i for i, s in enumerate(after) if s <= _RECOVERED * steady]
            return {
                "threads": [threads, slowed],
                "before_s": before,
                "after_s": after,
                "steady_s": steady,
                "recovered_steps": recovered[0],
            }

        found = self.bench.cell(f"{self.case.name}-recovery", measure)
        return found and {"kind": "recovery", "case": self.case.name, **found}

    def _half_speed(self) -> tuple[int, int]:
        """Threads that are at work, and fewer with which reading goes closest to half as fast.

        Half of the fastest: on a GPU some CPUs are left free, with which that was measured.
        """
        ceilings = self.bench.cell("machine", lambda: machine.run(self.bench.settings.machine))
        assert ceilings is not None
        reads = {
            r["threads"]: r["gb_s"]["median"] for r in ceilings["rows"] if r["pipe"] == "host read"
        }
        threads = int(native.info()["threads"])
        half = max(reads.values()) / 2
        fewer = [n for n in reads if n < threads] or [1]
        return threads, min(fewer, key=lambda n: abs(reads.get(n, half) - half))

    def floor(self) -> dict[str, Any]:
        """Steps of a cache that has no host part."""
        weights = self.bench.weights(self.case.model)
        return dense_floor(weights, len(self.case.context_tokens), self.bench.settings.calls)

    def _target(self, place: Any, plan: PlanSet) -> tuple[Target, Any]:
        layout = self.config.kv_layout(summaries=place)
        held = np.asarray([host_tokens(layout, t) for t in self.case.context_tokens])
        target = plan.target(self.config, layout, self.case.context_tokens, CHUNK_STEPS)
        return target, held

    def _selection(self, name: str, plan: PlanSet) -> dict[str, Any]:
        """Scoring and selection of all layers of the first step, on the device, alone."""
        target, held = self._target("device", plan)
        budgets = _imposed(name, target, plan, held, 1.0).budget_tokens[:, 0]
        granularity = target.granularity[:, 0]
        per_head = np.repeat(granularity, budgets.shape[-1] // granularity.shape[-1], axis=-1)
        units, k_units = (
            np.moveaxis(x, 1, 0).astype(np.int32) for x in (granularity, budgets // per_head)
        )
        shared = np.full(units.shape, name == GROUP)
        blocks = (held // BLOCK_TOKENS).astype(np.int32)
        selection = Selection(units, k_units, shared, blocks)
        seconds = selection_s(self.config, max(self.case.context_tokens), selection)
        return {"selection_s": summarise(seconds)}

    def _ready(
        self, place: str, name: str, plan: PlanSet, predicts: bool, split: str
    ) -> tuple[Stepper, Replayed, Target, Imposed]:
        """Steps, and plans with which the union of each group is as large as it should be."""
        stepper = self.bench.stepper_of(self.case, place, predicts)
        stepper.forget()
        target, held = self._target(place, plan)
        predictor = self.bench.predictor(self.case.model) if predicts else None
        raised, best, missed = 1.0, None, np.inf
        for _ in range(_UNION_TRIES):
            imposed = _imposed(name, target, plan, held, raised)
            policy = _policy(self.case, target, imposed, name == GROUP, predictor)
            _, totals = stepper.call(policy, self._split(split), _UNION_STEPS)
            read = int(np.sum(totals.host_blocks) + np.sum(totals.device_blocks))
            wanted = int(imposed.union_tokens[:, :_UNION_STEPS].sum()) // BLOCK_TOKENS
            if abs(read - wanted) < missed:
                best, missed = (policy, imposed), abs(read - wanted)
            if name == GROUP or missed <= _UNION_TOLERANCE * wanted:
                break
            raised *= wanted / max(read, 1)
        assert best is not None
        return stepper, best[0], target, best[1]

    def _steps(
        self, place: str, name: str, plan: PlanSet, predicts: bool, split: str
    ) -> dict[str, Any]:
        stepper, policy, target, imposed = self._ready(place, name, plan, predicts, split)
        timed = stepper.timed(policy, self._split(split), self.bench.settings.calls)
        totals, layout = timed.totals, stepper.cache.layout

        def per_step(counts: Any) -> float:
            return float(np.sum(counts)) / timed.steps

        on_host = place == "host"
        blocks = [per_step(x) for x in (totals.host_blocks, totals.device_blocks)]
        units = [per_step(totals.host_units), per_step(totals.device_units) if on_host else 0.0]
        host_bytes, device_bytes = (
            b * layout.block_bytes + u * layout.unit_summary_bytes
            for b, u in zip(blocks, units, strict=True)
        )
        wanted = float(imposed.union_tokens.sum()) / CHUNK_STEPS / BLOCK_TOKENS
        return {
            "kind": "steps",
            "case": self.case.name,
            "layers": layout.num_layers,
            "plan": name,
            "union_factor": plan.union_factor,
            "summaries": place,
            "predicts": predicts,
            "split": split,
            "threads": native.info()["threads"],
            "step_s": summarise(timed.step_s),
            "start_s": timed.start_s,
            "host_bytes": host_bytes,
            "device_bytes": device_bytes,
            "host_times_s": (totals.host_times_s.sum(axis=0) / timed.steps).tolist(),
            "union_read_of_wanted": sum(blocks) / wanted if wanted else 1.0,
            "statistics": plan_sets.statistics(target, imposed, self.case.context_tokens),
        }

    def _split(self, name: str) -> Split:
        if name != "adaptive":
            rates = (_ALWAYS, _NEVER) if name == "host" else (_NEVER, _ALWAYS)
            return adaptive(CostModel(*rates, 0.0, 0.0))
        return adaptive(measured_cost(self.rates))


def _imposed(name: str, target: Target, plan: PlanSet, held: Any, raised: float) -> Imposed:
    """A group that ranks once reads what its largest head does, whatever the keys are."""
    if name != GROUP:
        return impose(target, plan.union_factor, held, raised)
    largest = target.budget_tokens.reshape(*target.granularity.shape, -1).max(axis=-1)
    union = np.minimum(largest, held[:, None, None, None])
    return Imposed(target.budget_tokens.astype(np.int32), union)


def _policy(case: Case, target: Target, imposed: Imposed, shared: bool, predictor: Any) -> Replayed:
    first = np.asarray(case.context_tokens, np.int32)
    arrays = (first, target.granularity.astype(np.int32), imposed.budget_tokens)
    plans = ReplayPolicy(*(jnp.asarray(x) for x in arrays))
    return Replayed(plans, jnp.asarray(shared), predictor)
