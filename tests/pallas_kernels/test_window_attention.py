"""Attention to the resident window."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import window_attention
from tests.pallas_kernels import oracle

ATTEND = jax.jit(window_attention, static_argnames=("scale", "implementation"))


def make(group=3, slots=37, head_dim=64, dtype="float32"):
    rng = np.random.default_rng(group + slots + head_dim)
    batch, num_kv_heads = 3, 2
    kv_shape = (batch, num_kv_heads, slots, head_dim)
    q = jnp.asarray(rng.normal(size=(batch, num_kv_heads * group, head_dim)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=kv_shape), dtype) for _ in range(2))
    mask = rng.random((batch, slots)) < 0.6
    mask[2] = False
    return q, k, v, mask


def check(q, k, v, mask, scale):
    out, lse = ATTEND(q, k, v, jnp.asarray(mask), scale=scale)
    want_out, want_lse = oracle.window_attention(*map(oracle.to_float64, (q, k, v)), mask, scale)
    for b in range(q.shape[0]):
        for n in range(q.shape[1]):
            np.testing.assert_allclose(out[b, n], want_out[b, n], rtol=1e-5, atol=4e-6)
            np.testing.assert_allclose(lse[b, n], want_lse[b, n], rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize(
    ("group", "dtype"),
    [
        (1, "float32"),
        (3, "float32"),
        (3, "bfloat16"),
        (4, "bfloat16"),
        (7, "float16"),
        (7, "float32"),
        (8, "bfloat16"),
    ],
)
def test_matches_the_oracle_for_every_group_size(group, dtype):
    check(*make(group=group, dtype=dtype), 0.125)


@pytest.mark.parametrize(("slots", "head_dim"), [(1, 64), (336, 128), (65, 256)])
def test_matches_the_oracle_for_odd_sizes(slots, head_dim):
    check(*make(slots=slots, head_dim=head_dim), head_dim**-0.5)


def test_an_empty_window_is_an_empty_state():
    q, k, v, mask = make()
    out, lse = ATTEND(q, k, v, jnp.asarray(mask), scale=0.125)
    assert np.all(np.asarray(out)[2] == 0.0)
    assert np.all(np.asarray(lse)[2] == -np.inf)


def test_extreme_logits():
    q, k, v, mask = make()
    check(q * 100, k * 10, v, mask, 1.0)


@pytest.mark.parametrize("poison", ["k", "v"])
def test_nan_surfaces_only_from_slots_in_use(poison):
    q, k, v, mask = make()
    mask[:2, 5] = (True, False)
    arrays = {"k": k, "v": v}
    arrays[poison] = arrays[poison].at[:, :, 5].set(jnp.nan)
    out, _ = ATTEND(q, arrays["k"], arrays["v"], jnp.asarray(mask), scale=0.125)
    assert np.all(np.isnan(out[0]).any(axis=-1))
    assert not np.isnan(out[1:]).any()


def test_wrong_shapes_are_refused_with_what_is_expected():
    q, k, v, mask = make()
    with pytest.raises(ValueError, match=r"mask \[B, S\], got q \(3, 6, 64\).*correct the shapes"):
        window_attention(q, k, v, jnp.asarray(mask[:, :-1]), scale=1.0)
