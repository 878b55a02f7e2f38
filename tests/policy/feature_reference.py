"""The features in float64 NumPy, head by head, from whole keys and values instead of a sketch.

Shares nothing with the product but the names of the features and the choice of drawn tokens.
"""

from __future__ import annotations

import numpy as np

SINKS, RECENT, BLOCK = 64, 256, 16
LEAST, LARGEST = 1e-6, 30.0


def log2(x: float) -> float:
    return float(np.log2(x + LEAST))


def odds(x: float) -> float:
    return float(np.clip(x, -LARGEST, LARGEST))


def lse(x: np.ndarray) -> float:
    if x.size == 0:
        return -np.inf
    return float(np.log(np.exp(x - x.max()).sum()) + x.max())


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / max(np.linalg.norm(x) * np.linalg.norm(y), LEAST))


def host_tokens(length: int) -> int:
    return BLOCK * max(0, (length - SINKS - RECENT) // BLOCK)


def row_features(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    length: int,
    run_tokens: int,
    scale: float,
    layer: int,
    num_layers: int,
    state: dict[str, np.ndarray],
    probe_names: tuple[str, ...],
) -> list[dict[str, float]]:
    """Features of each head of one row in the step that adds token `length`.

    Args:
      q: `[N, H]`.
      k: `[length + 1, K, H]`, the new token's key last.
      v: likewise.
      length: tokens before the step.
      run_tokens: tokens of a run.
      scale: factor on scores.
      layer: index.
      num_layers: of the model.
      state: `previous_q [N, H]`, `previous_lse [N]` or None; `probes [N, F]`, `probe_q [N, H]`,
        `probe_position` or None.
      probe_names: names of the last axis of `probes`.
    """
    heads, kv_heads = len(q), k.shape[1]
    group = heads // kv_heads
    held = host_tokens(length)
    window = np.r_[np.arange(min(SINKS, length + 1)), np.arange(SINKS + held, length + 1)]
    window = np.unique(window)
    runs = range(-(-held // run_tokens))
    found, errors, shares, probe_errors, norms = [], [], [], [], []
    outs = []
    for n in range(heads):
        keys, values = k[:, n // group], v[:, n // group]
        s = scale * keys[window] @ q[n]
        window_lse = lse(s)
        window_out = np.exp(s - window_lse) @ values[window]
        drawn = np.asarray([SINKS + r * run_tokens + r * 7 % BLOCK for r in runs], int)
        count = np.asarray([min(run_tokens, held - r * run_tokens) for r in runs], float)
        bounds = []
        for r in runs:
            own = keys[SINKS + r * run_tokens : SINKS + min(held, (r + 1) * run_tokens)]
            bounds.append(scale * np.maximum(q[n] * own.min(0), q[n] * own.max(0)).sum())
        bounds = np.asarray(bounds)
        scores = scale * keys[drawn] @ q[n]
        weighted = scores + np.log(count)
        host_lse = lse(weighted)
        p = np.exp(weighted - host_lse) if held else np.zeros(0)
        host_out = p @ values[drawn] if held else np.zeros(q.shape[1])
        share = 1 / (1 + np.exp(-odds(host_lse - window_lse)))
        outs.append((window_out, host_out, share))
        key_norm = np.linalg.norm(keys[drawn], axis=1)
        value_norm = np.linalg.norm(values[drawn], axis=1)
        typical = max(key_norm.mean() if held else 0.0, LEAST)
        typical_value = max(value_norm.mean() if held else 0.0, LEAST)
        f = {
            "layer": layer / num_layers,
            "kv_head": n // group / kv_heads,
            "head_in_group": n % group / group,
            "host_tokens": np.log2(1 + held),
            "run_tokens": np.log2(run_tokens),
            "key_norm": log2(typical),
            "key_norm_deviation": key_norm.std() / typical if held else 0.0,
            "value_norm": log2(typical_value),
            "value_norm_peak": value_norm.max() / typical_value if held else 0.0,
            "key_coherence": np.linalg.norm(keys[drawn].mean(0)) / typical if held else 0.0,
            "value_coherence": np.linalg.norm(values[drawn].mean(0)) / typical_value
            if held
            else 0.0,
            "score_peak": odds((scores.max() if held else 0.0) - window_lse),
            "score_mean": odds((scores.mean() if held else 0.0) - window_lse),
            "score_deviation": scores.std() if held else 0.0,
            "host_odds": odds(host_lse - window_lse),
            "bound_peak": odds((bounds.max() if held else 0.0) - window_lse),
            "bound_range": bounds.max() - bounds.mean() if held else 0.0,
            "entropy_tokens": (-(p * np.log2(p)).sum() + (p * np.log2(count)).sum())
            if held
            else 0.0,
            "participation_runs": -log2((p**2).sum()),
            "share_peak": p.max() if held else 0.0,
            "bounds_above_1_percent": np.log2(
                1 + (bounds + np.log(count) - window_lse > np.log(0.01)).sum()
            ),
            "bounds_above_10_percent": np.log2(
                1 + (bounds + np.log(count) - window_lse > np.log(0.1)).sum()
            ),
            "bounds_above_window": np.log2(1 + (bounds > window_lse).sum()),
            "bounds_above_window_peak": np.log2(1 + (bounds > s.max()).sum()),
            "bounds_within_1_of_peak": np.log2(1 + (bounds > bounds.max() - 1).sum())
            if held
            else 0.0,
            "bounds_within_4_of_peak": np.log2(1 + (bounds > bounds.max() - 4).sum())
            if held
            else 0.0,
            "bound_deviation": bounds.std() if held else 0.0,
            "bound_peak_deviations": (bounds.max() - bounds.mean()) / max(bounds.std(), 1e-3)
            if held
            else 0.0,
            "query_norm": log2(scale * np.linalg.norm(q[n])),
            "host_share": share,
            "out_cosine": cosine(host_out, window_out),
            "sink_odds": odds(lse(s[window < SINKS]) - window_lse),
            "newest_odds": odds(lse(s[window > length - 16]) - window_lse),
            "window_peak_odds": odds(s.max() - window_lse),
        }
        if state["previous_q"] is None:
            f |= dict.fromkeys(
                ("query_cosine", "query_norm_change", "window_lse_change", "has_previous"), 0.0
            )
        else:
            before = state["previous_q"][n]
            f |= {
                "query_cosine": cosine(q[n], before),
                "query_norm_change": log2(np.linalg.norm(q[n])) - log2(np.linalg.norm(before)),
                "window_lse_change": odds(window_lse - state["previous_lse"][n]),
                "has_previous": 1.0,
            }
        probed = state["probe_position"] is not None
        f["probe_cosine"] = cosine(q[n], state["probe_q"][n]) if probed else 0.0
        for i, name in enumerate(probe_names):
            f[f"probe_{name}"] = state["probes"][n, i] if probed else 0.0
        f["tokens_since_probe"] = np.log2(1 + length - state["probe_position"]) if probed else 0.0
        probe_errors.append(f["probe_window_error"])
        found.append(f)
    largest = max(np.linalg.norm(w + m * (h - w)) for w, h, m in outs)
    widest = max(np.linalg.norm(w) for w, _, _ in outs)
    for f, (window_out, host_out, share) in zip(found, outs, strict=True):
        f["window_error"] = log2(share * np.linalg.norm(host_out - window_out) / largest)
        f["out_norm"] = log2(np.linalg.norm(window_out) / widest)
        errors.append(f["window_error"])
        shares.append(share)
        norms.append(f["out_norm"])
    for n, f in enumerate(found):
        own = slice(n // group * group, n // group * group + group)
        f |= {
            "group_error_mean": np.mean(errors[own]),
            "group_error_peak": np.max(errors[own]),
            "layer_error_mean": np.mean(errors),
            "layer_error_peak": np.max(errors),
            "group_share_mean": np.mean(shares[own]),
            "group_probe_error_peak": np.max(probe_errors[own]),
        }
    return found
