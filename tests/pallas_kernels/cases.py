"""Inputs of block-sparse attention that every implementation must get right."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests.pallas_kernels import oracle

TOLERANCE = {
    # Absolute, on unit-variance inputs, against float64 on the same stored values. Storage in
    # half precision loses nothing more, because everything is computed in float32.
    "float32": {"out": 4e-6, "lse": 4e-6},
    "bfloat16": {"out": 4e-6, "lse": 4e-6},
    "float16": {"out": 4e-6, "lse": 4e-6},
}


class Case(NamedTuple):
    q: jax.Array
    k: jax.Array
    v: jax.Array
    selected: np.ndarray
    scale: float

    @property
    def bitmap(self) -> jax.Array:
        return jnp.asarray(oracle.pack(self.selected))


def random_case(
    *, batch=2, num_kv_heads=3, group=4, num_blocks=40, head_dim=64, dtype="float32", fraction=0.3
) -> Case:
    rng = np.random.default_rng(batch * 1000 + group * 100 + num_blocks + head_dim)
    kv_shape = (batch, num_kv_heads, num_blocks, oracle.BLOCK_TOKENS, head_dim)
    num_heads = num_kv_heads * group
    return Case(
        jnp.asarray(rng.normal(size=(batch, num_heads, head_dim)), jnp.float32),
        jnp.asarray(rng.normal(size=kv_shape), dtype),
        jnp.asarray(rng.normal(size=kv_shape), dtype),
        rng.random((batch, num_heads, num_blocks)) < fraction,
        head_dim**-0.5,
    )


def check(attend, case: Case, *, out_scale=1.0) -> None:
    """Compares every row of `attend` with the oracle."""
    out, lse = attend(case.q, case.k, case.v, case.bitmap, scale=case.scale)
    want_out, want_lse = oracle.block_sparse_attention(
        *map(oracle.to_float64, (case.q, case.k, case.v)), case.selected, case.scale
    )
    assert out.dtype == lse.dtype == jnp.float32
    tolerance = TOLERANCE[str(case.k.dtype)]
    batch, num_heads, _ = out.shape
    for b in range(batch):
        for n in range(num_heads):
            np.testing.assert_allclose(
                out[b, n],
                want_out[b, n],
                rtol=1e-5,
                atol=tolerance["out"] * out_scale,
                err_msg=f"out of row {b}, head {n}",
            )
            np.testing.assert_allclose(
                lse[b, n],
                want_lse[b, n],
                rtol=1e-6,
                atol=tolerance["lse"],
                err_msg=f"lse of row {b}, head {n}",
            )


def check_share(attend, case: Case) -> None:
    """Compares `attend` from some boundaries on with the oracle, and what it says that it read."""
    batch, num_heads, num_blocks = case.selected.shape
    kv_heads = case.k.shape[1]
    boundary = np.resize([-1, 0, 5, 32, num_blocks - 3, num_blocks + 4], (batch, kv_heads))
    of_head = np.repeat(boundary, num_heads // kv_heads, axis=1)
    mine = case.selected & (np.arange(num_blocks) >= of_head[..., None])
    read = []

    def share(q, k, v, bitmap, *, scale):
        *state, blocks = attend(q, k, v, bitmap, jnp.asarray(boundary, jnp.int32), scale=scale)
        read.append(blocks)
        return state

    bitmap = case.bitmap
    check(
        lambda q, k, v, _, *, scale: share(q, k, v, bitmap, scale=scale),
        case._replace(selected=mine),
    )
    union = mine.reshape(batch, kv_heads, -1, num_blocks).any(axis=2)
    np.testing.assert_array_equal(read[0], union.sum(axis=-1))


def check_rows(attend, case: Case) -> None:
    """Gives `attend` a cache of several layers: the same bits, wherever the call's own lies."""
    batch, kv_heads = case.k.shape[:2]
    boundary = jnp.full((batch, kv_heads), 5, jnp.int32)
    arguments = (case.bitmap, boundary)
    want = attend(case.q, case.k, case.v, *arguments, scale=case.scale)
    others = jnp.full((batch + 1, *case.k.shape[1:]), jnp.nan, case.k.dtype)
    for first in (0, 1, batch + 1):
        stacked = (jnp.concatenate([others[:first], x, others[first:]]) for x in (case.k, case.v))
        row = jnp.asarray([first], jnp.int32)
        got = attend(case.q, *stacked, *arguments, first_row=row, scale=case.scale)
        for one, other in zip(got, want, strict=True):
            np.testing.assert_array_equal(one, other, err_msg=f"first row {first}")


def empty_sets() -> Case:
    """A row without any block, a group without any, and single empty heads in full groups."""
    case = random_case(batch=3, num_kv_heads=2, group=3, num_blocks=35)
    selected = case.selected.copy()
    selected[0] = False
    selected[1, :3] = False
    selected[2, 1] = False
    selected[2, 2] = True
    return case._replace(selected=selected)


def word_edges() -> Case:
    """Single blocks around the edge of a bitmap word, and the last block of all."""
    case = random_case(batch=1, num_kv_heads=1, group=8, num_blocks=71)
    selected = np.zeros_like(case.selected)
    for head, block in enumerate((0, 30, 31, 32, 33, 63, 64, 70)):
        selected[0, head, block] = True
    return case._replace(selected=selected)


def extreme_logits() -> Case:
    """Scores of thousands, of one sign and the other, and one key that beats all others."""
    case = random_case(batch=1, num_kv_heads=2, group=3, num_blocks=33, fraction=0.5)
    k = case.k.at[0, 0].multiply(200.0).at[0, 1, 4, 7].set(500.0)
    selected = case.selected.copy()
    selected[0, :, 4] = True
    return case._replace(q=jnp.abs(case.q), k=k, selected=selected)


def check_nan(attend) -> None:
    """NaN in one block: it surfaces in the heads that selected it, and in no other head."""
    for poison in ("k", "v"):
        case = random_case(batch=2, num_kv_heads=2, group=3, num_blocks=34, fraction=0.4)
        selected = case.selected.copy()
        selected[1, :, 33] = (True, False, False, False, True, False)
        array = getattr(case, poison)
        # In KV head 1 nobody but head 4 selects the block; head 0 reads its own, clean one.
        case = case._replace(selected=selected, **{poison: array.at[1, 1, 33, 5].set(jnp.nan)})
        out, _ = attend(case.q, case.k, case.v, case.bitmap, scale=case.scale)
        surfaced = np.asarray(jnp.isnan(out).any(axis=-1))
        expected = np.zeros_like(surfaced)
        expected[1, 4] = True
        np.testing.assert_array_equal(surfaced, expected, err_msg=f"NaN in {poison}")
