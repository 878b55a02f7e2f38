"""What the kernels mean, in float64 NumPy loops; shares no code with what it checks."""

from __future__ import annotations

import numpy as np

BLOCK_TOKENS = 16


def to_float64(array) -> np.ndarray:
    return np.asarray(array.astype("float32")).astype(np.float64)


def attend(q, keys, values, scale):
    """One query `[H]` on keys and values `[tokens, H]`."""
    if len(keys) == 0:
        return np.zeros(q.shape[-1]), -np.inf
    scores = keys @ q * scale
    largest = scores.max()
    weights = np.exp(scores - largest)
    return weights @ values / weights.sum(), largest + np.log(weights.sum())


def window_attention(q, k, v, mask, scale):
    batch, num_heads, head_dim = q.shape
    group = num_heads // k.shape[1]
    out, lse = np.zeros((batch, num_heads, head_dim)), np.zeros((batch, num_heads))
    for b in range(batch):
        for n in range(num_heads):
            rows = np.flatnonzero(mask[b])
            out[b, n], lse[b, n] = attend(
                q[b, n], k[b, n // group][rows], v[b, n // group][rows], scale
            )
    return out, lse


def block_sparse_attention(q, k, v, selected, scale):
    """`selected` is bool `[B, N, P]`."""
    batch, num_heads, head_dim = q.shape
    group = num_heads // k.shape[1]
    out, lse = np.zeros((batch, num_heads, head_dim)), np.zeros((batch, num_heads))
    for b in range(batch):
        for n in range(num_heads):
            blocks = np.flatnonzero(selected[b, n])
            keys = k[b, n // group][blocks].reshape(-1, head_dim)
            values = v[b, n // group][blocks].reshape(-1, head_dim)
            out[b, n], lse[b, n] = attend(q[b, n], keys, values, scale)
    return out, lse


def units_of(granularity: int, host_blocks: int) -> int:
    per_unit = granularity // BLOCK_TOKENS
    return (host_blocks + per_unit - 1) // per_unit


def score_units(q8, summaries, granularity, host_blocks):
    batch, num_heads, _ = q8.shape
    num_kv_heads = summaries.shape[1]
    group = num_heads // num_kv_heads
    num_blocks = summaries.shape[2] * 8 // 15
    first_row = {16: 0, 32: num_blocks, 64: num_blocks * 3 // 2, 128: num_blocks * 7 // 4}
    scores = np.full((batch, num_heads, num_blocks), np.iinfo(np.int32).min, np.int64)
    for b in range(batch):
        for n in range(num_heads):
            g = int(granularity[b, n // group])
            for unit in range(units_of(g, int(host_blocks[b]))):
                lo, hi = summaries[b, n // group, first_row[g] + unit].astype(np.int64)
                query = q8[b, n].astype(np.int64)
                scores[b, n, unit] = np.maximum(query * lo, query * hi).sum()
    return scores


def select_units(scores, granularity, host_blocks, k_units, shared):
    """Returns bool `[B, N, P]`."""
    batch, num_heads, num_blocks = scores.shape
    num_kv_heads = granularity.shape[1]
    group = num_heads // num_kv_heads
    selected = np.zeros((batch, num_heads, num_blocks), bool)
    for b in range(batch):
        for n in range(num_heads):
            task = n // group
            heads = range(task * group, (task + 1) * group) if shared[b, task] else [n]
            units = units_of(int(granularity[b, task]), int(host_blocks[b]))
            best = [max(int(scores[b, head, unit]) for head in heads) for unit in range(units)]
            wanted = min(max(max(int(k_units[b, head]) for head in heads), 0), units)
            per_unit = int(granularity[b, task]) // BLOCK_TOKENS
            for unit in sorted(range(units), key=lambda u: (-best[u], u))[:wanted]:
                selected[b, n, unit * per_unit : (unit + 1) * per_unit] = True
            selected[b, n, int(host_blocks[b]) :] = False
    return selected


def pack(bits):
    words = -(-bits.shape[-1] // 32)
    bitmap = np.zeros((*bits.shape[:-1], words), np.uint32)
    for index in np.argwhere(bits):
        *rest, block = (int(i) for i in index)
        bitmap[(*rest, block // 32)] |= np.uint32(1 << (block % 32))
    return bitmap
