"""`fluxion bench step`: whole decode steps of large models, against the bytes they must read.

Weights and caches are random, so nothing is downloaded; times depend on sizes alone. For each
model, context, batch, place of the summaries and kind of split (a given share, `model`, `adaptive`)
one compiled program runs all policies, which are data.
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

from fluxion_jax.bench import machine, offloaded, roundtrip
from fluxion_jax.bench.cells import Cells
from fluxion_jax.bench.random_arrays import random_array
from fluxion_jax.bench.stamp import stamp
from fluxion_jax.bench.statistics import summarise
from fluxion_jax.bench.step_programs import (
    LLAMA_8B,
    QWEN_7B,
    Stepper,
    dense_floor,
    dense_program,
    fixed_selection,
    random_cache,
    random_weights,
    selection_s,
    time_calls,
)
from fluxion_jax.bench.step_report import costs
from fluxion_jax.models.config import ModelConfig
from fluxion_jax.policy import CostModel, Split, adaptive, modelled, parse_policy, split_at

# Best first: what is measured last may be left out.
SPLITS = ("model", "adaptive", "host", "device")
_RESIDENT_FRACTION = 0.9
_FULL_CALLS = 5
# Models that `transformers` is timed with, too.
_OFFLOADED = ("llama-3.1-8b",)
_MACHINE = machine.Settings(roundtrip_layers=None)
_ROUNDTRIP = roundtrip.Settings((8, 24), 30)


@dataclasses.dataclass(frozen=True)
class Case:
    """One model and its batch.

    Attributes:
      model: a name in `Settings.models`.
      context_tokens: of each row.
      policies: names of fixed policies.
      baselines: whether also to time attention to everything, streamed and resident.
      splits: who reads; names of splits.
    """

    model: str
    context_tokens: tuple[int, ...]
    policies: tuple[str, ...]
    baselines: bool = False
    splits: tuple[str, ...] = SPLITS

    @property
    def name(self) -> str:
        """Part of a file name."""
        contexts = sorted(set(self.context_tokens))
        span = "-".join(str(c) for c in (contexts[0], contexts[-1])[: len(contexts)])
        return f"{self.model}-{span}-b{len(self.context_tokens)}"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      models: configurations by name.
      cases: in the order in which they are measured.
      summaries: where summaries live.
      calls: timed calls of a chunk of steps.
      machine: how the ceilings are measured.
      roundtrip: how the hand-over is measured.
    """

    models: dict[str, ModelConfig]
    cases: tuple[Case, ...]
    summaries: tuple[str, ...] = ("device", "host")
    calls: int = 5
    machine: machine.Settings = _MACHINE
    roundtrip: roundtrip.Settings = _ROUNDTRIP


_MODELS = {"llama-3.1-8b": LLAMA_8B, "qwen2.5-7b": QWEN_7B}
_GRID = tuple(f"fixed:{g}:{f}{s}" for g in (16, 32) for f in (0.05, 0.02) for s in ("", ":group"))
_CORNERS = ("fixed:16:0.05", "fixed:32:0.02:group")
_RAGGED = (8192, 16384, 32768, 65536)
QUICK = Settings(
    _MODELS,
    (Case("llama-3.1-8b", (131072,), ("fixed:16:0.02:group", "fixed:16:0.05"), baselines=True),),
    machine=machine.Settings(repetitions=3, roundtrip_layers=None),
)
# The longest context that one machine of 128 GiB holds; its keys and values take 64 GiB.
LONG = Settings(
    _MODELS,
    (Case("llama-3.1-8b", (524288,), ("fixed:16:0.02:group",), splits=("model",)),),
    summaries=("host", "device"),
    calls=2,
    machine=machine.Settings(repetitions=3, roundtrip_layers=None),
    roundtrip=roundtrip.Settings((8, 24), 10),
)
FULL = Settings(
    _MODELS,
    (
        *(Case("llama-3.1-8b", (s,), _GRID, baselines=True) for s in (131072, 65536, 32768)),
        *(Case("qwen2.5-7b", (s,), _CORNERS, baselines=True) for s in (131072, 32768)),
        *(Case("llama-3.1-8b", (32768,) * b, _CORNERS) for b in (4, 8)),
        Case("llama-3.1-8b", _RAGGED, _CORNERS),
    ),
)


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
    return {
        "benchmark": "step",
        "stamp": stamp(),
        "machine": ceilings,
        "roundtrip": handover,
        "rows": rows,
        "left_out": bench.left_out,
        "failed": bench.failed,
    }


def rates_gb_s(ceilings: dict[str, Any]) -> dict[str, float]:
    """Rates of the sides alone and at once. Without a GPU both sides read the same memory."""
    by_pipe = {r["pipe"]: r["gb_s"]["median"] for r in ceilings["rows"]}
    host, bus = by_pipe["host read"], by_pipe.get("host to device", by_pipe["host read"])
    at_once = ceilings["together"]
    both = at_once["sum_gb_s"]["median"] if at_once else host
    return {
        "host": host,
        "device": bus,
        "model": both,
        "adaptive": both,
        "host_at_once": at_once["host_gb_s"]["median"] if at_once else host,
        "pcie_at_once": at_once["pcie_gb_s"]["median"] if at_once else bus,
    }


def measured_cost(rates: dict[str, float]) -> CostModel:
    """The cost model of a machine of such rates, from `rates_gb_s`."""
    return machine.cost_at(rates["host_at_once"], rates["pcie_at_once"])


class _Bench(Cells):
    """Cells, and what they share: weights, caches and programs, made when first needed."""

    def __init__(
        self,
        settings: Settings,
        folder: Path | None,
        say: Callable[[str], None],
        budget_s: float | None,
    ) -> None:
        super().__init__("step", folder, say, budget_s)
        self.settings = settings
        self.weights = functools.lru_cache(maxsize=1)(self._weights)
        self.stepper: tuple[Case, str, Stepper] | None = None

    def after_failure(self) -> None:
        self.stepper = None

    def case(
        self, case: Case, rates: dict[str, float], handover: dict[str, Any]
    ) -> list[dict[str, Any]]:
        config = self.settings.models[case.model]
        floor = self.cell(f"{case.name}-floor", lambda: self._floor(case))
        # What attends to everything is not compared with the floor.
        policies = () if f"{case.name}-floor" in self.failed else case.policies
        rows: list[dict[str, Any]] = []
        for position, summaries in enumerate(self.settings.summaries):
            for policy in policies:
                alone = self._selection_alone(case, summaries, policy)
                for split in case.splits:
                    name = f"{case.name}-{summaries}-{policy}-{split}"
                    measure = functools.partial(self._step, case, summaries, policy, split, rates)
                    row = self.cell(name, measure)
                    if row and floor and alone:
                        parts = costs(row, floor, alone, handover, rates, config)
                        rows.append({**row, **parts})
            if position == 0 and case.baselines:
                rows += self._baselines(case)
        self.stepper = None
        return rows

    def _baselines(self, case: Case) -> list[dict[str, Any]]:
        """Attention to everything: streamed, resident, and offloaded by another library."""
        rows = []
        for place in ("pinned_host", "device"):
            measure = functools.partial(self._full, case, place)
            rows.append(self.cell(f"{case.name}-full-{place}", measure))
        if jax.default_backend() == "gpu" and case.model in _OFFLOADED:
            rows.append(self.cell(f"{case.name}-offloaded", lambda: self._offloaded(case)))
        return [row for row in rows if row]

    def _offloaded(self, case: Case) -> dict[str, Any]:
        config = self.settings.models[case.model]
        found = offloaded.measure(config, case.context_tokens[0], 2)
        row = {"kind": "full", "case": case.name, "place": "transformers", **found}
        return {**row, "kv_bytes": self._kv_bytes(case), "step_s": summarise(found["step_s"])}

    def _kv_bytes(self, case: Case) -> int:
        config = self.settings.models[case.model]
        tokens = len(case.context_tokens) * max(case.context_tokens)
        return 4 * config.num_layers * config.num_kv_heads * config.head_dim * tokens

    def _weights(self, model: str) -> Any:
        self.say(f"weights of {model}")
        return jax.block_until_ready(random_weights(self.settings.models[model]))

    def _floor(self, case: Case) -> dict[str, Any]:
        """The same steps of a cache that has no host part: what is neither selected nor read."""
        return dense_floor(self.weights(case.model), len(case.context_tokens), self.settings.calls)

    def _selection_alone(self, case: Case, summaries: str, policy: str) -> dict[str, Any] | None:
        """Scoring and selection by the device; on the host both are part of the host's time."""
        if summaries == "host":
            return {"selection_s": None}
        parsed, config = parse_policy(policy), self.settings.models[case.model]
        longest, batch = max(case.context_tokens), len(case.context_tokens)
        plan = fixed_selection(config, longest, batch, parsed)

        def measure() -> dict[str, Any]:
            return {"selection_s": summarise(selection_s(config, longest, plan))}

        return self.cell(f"{case.name}-selection-{policy}", measure)

    def _stepper(self, case: Case, summaries: str) -> Stepper:
        if self.stepper is None or self.stepper[:2] != (case, summaries):
            keep = self.stepper[2].cache if self.stepper and self.stepper[0] == case else None
            weights = self.weights(case.model)
            self.say(f"cache of {case.name}, summaries on the {summaries}")
            cache = random_cache(weights.config, case.context_tokens, summaries, keep)
            self.stepper = (case, summaries, Stepper(weights, cache))
        return self.stepper[2]

    def _step(
        self, case: Case, summaries: str, policy: str, split: str, rates: dict[str, float]
    ) -> dict[str, Any]:
        stepper = self._stepper(case, summaries)
        stepper.forget()
        timed = stepper.timed(parse_policy(policy), _split(split, rates), self.settings.calls)
        totals, layout = timed.totals, stepper.cache.layout

        def per_step(counts: Any) -> float:
            return float(np.sum(counts)) / timed.steps

        on_host = summaries == "host"
        scanned = layout.unit_summary_bytes
        return {
            "kind": "sparse",
            "case": case.name,
            "layers": layout.num_layers,
            "summaries": summaries,
            "policy": policy,
            "split": split,
            "step_s": summarise(timed.step_s),
            "start_s": timed.start_s,
            "host_bytes": per_step(totals.host_blocks) * layout.block_bytes
            + per_step(totals.host_units) * scanned,
            "device_bytes": per_step(totals.device_blocks) * layout.block_bytes
            + (per_step(totals.device_units) * scanned if on_host else 0.0),
            "host_times_s": (totals.host_times_s.sum(axis=0) / timed.steps).tolist(),
        }

    def _full(self, case: Case, place: str) -> dict[str, Any]:
        """Attention to everything: the KV streamed over the bus, or resident on the device."""
        weights = self.weights(case.model)
        config, batch = weights.config, len(case.context_tokens)
        shape = (batch, config.num_kv_heads, max(case.context_tokens), config.head_dim)
        kv_bytes = self._kv_bytes(case)
        row = {"kind": "full", "case": case.name, "place": place, "kv_bytes": kv_bytes}
        if place == "device" and not _fits(kv_bytes):
            return {**row, "step_s": None, "reason": "the KV does not fit on the device"}
        k, v = (
            tuple(
                random_array(shape, jnp.bfloat16, place, 2 * layer + part)
                for layer in range(config.num_layers)
            )
            for part in (0, 1)
        )
        program = dense_program()
        token = jnp.zeros((batch,), jnp.int32)
        seconds = time_calls(
            lambda: program(weights.graph, weights.params, token, k, v), _FULL_CALLS
        )
        return {**row, "step_s": summarise(seconds)}


def _split(name: str, rates: dict[str, float]) -> Split:
    if name in ("host", "device"):
        return split_at(1.0 if name == "host" else 0.0)
    build = adaptive if name == "adaptive" else modelled
    return build(measured_cost(rates))


def _fits(kv_bytes: int) -> bool:
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return True
    free = stats["bytes_limit"] - stats["bytes_in_use"]
    return bool(kv_bytes < _RESIDENT_FRACTION * free)
