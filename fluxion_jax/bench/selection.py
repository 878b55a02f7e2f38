"""`fluxion bench selection`: integer selection against its alternatives on a real model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from fluxion_jax.bench.capture import capture
from fluxion_jax.bench.selection_quality import (
    METHODS,
    Array,
    full_attention,
    judge,
    select,
    unit_scores,
)
from fluxion_jax.bench.stamp import stamp
from fluxion_jax.cache.layout import GRANULARITIES_TOKENS
from fluxion_jax.demo import long_text
from fluxion_jax.errors import ConfigError
from fluxion_jax.models.load import LoadedModel, load_model

BUDGETS = (0.02, 0.05, 0.10)
SINK_TOKENS, RECENT_TOKENS = 64, 256


def run(
    model_name: str = "smollm2-135m",
    *,
    context_tokens: int = 8192,
    num_queries: int = 64,
    budgets: Sequence[float] = BUDGETS,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Measures every method at every granularity and budget, by head and by group.

    The queries are spread over the last 256 tokens. The host holds the same tokens for all of
    them, those between the sinks and the recent tokens of the first query; a query's window is
    everything else up to its position.

    Args:
      model_name: see `load_model`; a model without sliding-window layers.
      context_tokens: length of the text, at least 1024.
      num_queries: queries per head and layer.
      budgets: fractions of the context that may be selected.
      progress: show a progress bar; None shows it on a terminal and in a notebook.

    Returns:
      The report: `stamp`, `settings` and `rows`, each row with `granularity`, `budget_fraction`,
      `ranking`, `method`, `recall` (mass of selected units and window), `host_recall` (selected
      mass over the host's mass), `oracle_share` (selected mass over the oracle's), `output_error`,
      and for `integer` also `lost_fraction`, the selected mass that float bounds have more, with
      `lost_standard_error`, by leaving out one layer at a time, and `lost_recall`, the same of the
      recall.

    Raises:
      ConfigError: the text or the model's context is too short, or the model does not fit.
    """
    loaded = load_model(model_name, dtype="float32")
    tokens = _tokens(loaded, context_tokens)
    first = context_tokens - RECENT_TOKENS
    positions = np.linspace(first, context_tokens - 1, num_queries).astype(np.int64)
    end = SINK_TOKENS + (first - RECENT_TOKENS - SINK_TOKENS) // 16 * 16
    host = slice(SINK_TOKENS, end)
    totals: dict[tuple[int, float, str, str], list[np.ndarray]] = defaultdict(list)
    host_mass = 0.0
    layers = tqdm(
        capture(loaded.model, tokens, positions),
        total=loaded.config.num_layers,
        unit="layer",
        disable=None if progress is None else not progress,
    )
    for layer in layers:
        attention = full_attention(layer, positions, host)
        host_mass += float(np.mean(1 - attention.window_mass)) / loaded.config.num_layers
        for granularity in GRANULARITIES_TOKENS:
            for ranking in ("head", "group"):
                for method in METHODS:
                    scores = unit_scores(
                        method, layer, attention, host, granularity, ranking == "group"
                    )
                    for budget in budgets:
                        wanted = -int(-budget * context_tokens // granularity)
                        chosen = select(scores, wanted)
                        mass, error = judge(chosen, layer, attention, host, granularity)
                        recall = mass + attention.window_mass
                        means = np.array([mass.mean(), recall.mean(), error.mean()], np.float64)
                        totals[granularity, budget, ranking, method].append(means)
    rows = [_row(key, totals, host_mass) for key in totals]
    return {
        "benchmark": "selection",
        "stamp": stamp(),
        "settings": {
            "model": model_name,
            "text": "pydoc_data.topics",
            "context_tokens": context_tokens,
            "host_tokens": end - SINK_TOKENS,
            "sink_tokens": SINK_TOKENS,
            "queries_per_head": num_queries,
            "layers": loaded.config.num_layers,
            "heads": loaded.config.num_heads,
            "host_mass": host_mass,
        },
        "largest_lost_fraction": max(r["lost_fraction"] for r in rows if "lost_fraction" in r),
        "largest_lost_recall": max(r["lost_recall"] for r in rows if "lost_recall" in r),
        "rows": rows,
    }


def _tokens(loaded: LoadedModel, context_tokens: int) -> Any:
    if loaded.tokenizer is None or loaded.config.sliding_layers:
        raise ConfigError(
            f"expected a model with a tokenizer and without sliding layers, got {loaded.name}; "
            "use smollm2-135m"
        )
    tokens = loaded.tokenizer.encode(long_text())
    longest = min(len(tokens), loaded.config.max_context_tokens)
    if not 1024 <= context_tokens <= longest:
        raise ConfigError(
            f"expected context_tokens from 1024 to {longest} for this model and text, "
            f"got {context_tokens}"
        )
    return jnp.asarray(tokens[:context_tokens], jnp.int32)


def _row(
    key: tuple[int, float, str, str], totals: dict[Any, list[np.ndarray]], host_mass: float
) -> dict[str, Any]:
    granularity, budget, ranking, method = key
    mass, recall, error = np.mean(totals[key], axis=0).tolist()
    oracle = float(np.mean(totals[*key[:3], "oracle"], axis=0)[0])
    row = {
        "granularity": granularity,
        "budget_fraction": budget,
        "ranking": ranking,
        "method": method,
        "recall": recall,
        "host_recall": mass / host_mass,
        "oracle_share": mass / oracle,
        "output_error": error,
    }
    if method == "integer":
        ours, floats = (np.array(totals[*key[:3], name]) for name in ("integer", "float"))
        row["lost_fraction"] = 1 - mass / float(floats[:, 0].mean())
        row["lost_standard_error"] = standard_error_of_ratio(ours[:, 0], floats[:, 0])
        row["lost_recall"] = 1 - recall / float(floats[:, 1].mean())
    return row


def standard_error_of_ratio(above: Array, below: Array) -> float:
    """Standard error of `above.sum() / below.sum()` by leaving out one pair at a time."""
    pairs = len(above)
    if pairs < 2:
        return 0.0
    ratios = (above.sum() - above) / (below.sum() - below)
    return float(np.sqrt((pairs - 1) * np.mean((ratios - ratios.mean()) ** 2)))


def render(report: dict[str, Any]) -> str:
    """The report as a table for a terminal; it is Markdown as well."""
    rows = {
        (r["ranking"], r["granularity"], r["budget_fraction"], r["method"]): r
        for r in report["rows"]
    }
    settings = report["settings"]
    lines = [
        f"{settings['model']}, {settings['context_tokens']} tokens, {settings['layers']} layers, "
        f"{settings['heads']} heads, {settings['queries_per_head']} queries each. Recall is the "
        "share of attention mass in the window and the selected units; err is the output error.",
        "",
        "| ranked per | unit | budget | oracle | float | integer | mean | err float | err integer "
        "| err mean | integer loses |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for ranking, granularity, budget in dict.fromkeys(key[:3] for key in rows):
        of = {m: rows[ranking, granularity, budget, m] for m in METHODS}
        recall = " | ".join(f"{of[m]['recall']:.4f}" for m in METHODS)
        error = " | ".join(f"{of[m]['output_error']:.4f}" for m in METHODS[1:])
        lost = "{lost_fraction:+.3%} ± {lost_standard_error:.3%}".format(**of["integer"])
        lines.append(f"| {ranking} | {granularity} | {budget:.0%} | {recall} | {error} | {lost} |")
    lines += [
        "",
        f"Largest loss against float bounds: {report['largest_lost_fraction']:+.3%} of the "
        f"selected mass, {report['largest_lost_recall']:+.3%} of the recall",
    ]
    return "\n".join(lines)
