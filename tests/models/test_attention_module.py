"""The attention module's dense path against a loop over queries in float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fluxion_jax.errors import ConfigError
from fluxion_jax.modules import Attention, RMSNorm
from fluxion_jax.rope import Rope
from tests.host_memory import traced_for_gpu

D_MODEL = 20


def make(num_heads: int = 6, num_kv_heads: int = 2, head_dim: int = 8, **changes: Any) -> Attention:
    module = Attention(D_MODEL, num_heads, num_kv_heads, head_dim, rngs=nnx.Rngs(0), **changes)
    rng = np.random.default_rng(1)

    def noise(x: jax.Array) -> jax.Array:
        return jnp.asarray(rng.normal(size=x.shape) * 0.25 + (x.ndim == 1), x.dtype)

    nnx.update(module, jax.tree.map(noise, nnx.state(module)))
    return module


@nnx.jit
def _run(module: Attention, x: jax.Array) -> jax.Array:
    return module(x)


def run(module: Attention, x: np.ndarray) -> np.ndarray:
    return np.asarray(_run(module, jnp.asarray(x, jnp.float32)))


def linear(layer: nnx.Linear, x: np.ndarray) -> np.ndarray:
    out = x @ np.asarray(layer.kernel[...], np.float64)
    return out if layer.bias is None else out + np.asarray(layer.bias[...], np.float64)


def normed(norm: RMSNorm | None, x: np.ndarray) -> np.ndarray:
    if norm is None:
        return x
    scale = np.asarray(norm.scale[...], np.float64)
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + norm.eps) * scale


def rotated(rope: Rope | None, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    if rope is None:
        return x
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * rope.frequencies(2 * half).astype(np.float64)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def expected(module: Attention, x: np.ndarray, first: int, positions: np.ndarray) -> np.ndarray:
    """Output of the last token of `x` `[S, D]`, seeing tokens from `first` on."""
    heads, kv_heads, size = module.num_heads, module.num_kv_heads, module.head_dim
    q = normed(module.q_norm, linear(module.q, x[-1:]).reshape(1, heads, size))
    q = rotated(module.rope, q, positions[-1:])[0]
    k = normed(module.k_norm, linear(module.k, x[first:]).reshape(-1, kv_heads, size))
    k = rotated(module.rope, k, positions[first:])
    v = linear(module.v, x[first:]).reshape(-1, kv_heads, size)
    out = []
    for head in range(heads):
        group = head // (heads // kv_heads)
        scores = k[:, group] @ q[head] * module.scale
        weights = np.exp(scores - scores.max())
        out.append(weights / weights.sum() @ v[:, group])
    return linear(module.o, np.concatenate(out))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_heads": 1, "num_kv_heads": 1},
        {"num_heads": 8, "num_kv_heads": 2},
        {"num_heads": 7, "num_kv_heads": 1},
        {"num_heads": 8, "num_kv_heads": 1, "head_dim": 4},
        {"rope": None},
        {"rope": Rope.linear(1e6, 8.0)},
        {"scale": 1.3},
        {"qkv_bias": True},
        {"out_bias": True},
        {"qk_norm_eps": 1e-3},
        {"sliding_window": 5},
        {"sliding_window": 1},
        {"qk_norm_eps": 1e-6, "qkv_bias": True, "sliding_window": 4, "rope": Rope(100.0)},
    ],
    ids=str,
)
def test_dense_attention(settings: dict[str, Any]) -> None:
    module = make(**settings)
    x = np.random.default_rng(2).normal(size=(2, 13, D_MODEL))
    out = run(module, x)
    window = settings.get("sliding_window") or 13
    for row in range(2):
        for token in range(13):
            wanted = expected(
                module, x[row, : token + 1], max(0, token + 1 - window), np.arange(token + 1)
            )
            np.testing.assert_allclose(out[row, token], wanted, rtol=0, atol=2e-5)


def test_positions_are_those_given() -> None:
    module = make()
    x = np.random.default_rng(2).normal(size=(1, 4, D_MODEL))
    positions = np.array([[3, 50, 51, 200]], np.int32)
    out = module(jnp.asarray(x, jnp.float32), jnp.asarray(positions))
    wanted = expected(module, x[0], 0, positions[0])
    np.testing.assert_allclose(out[0, -1], wanted, rtol=0, atol=2e-5)


def test_a_rotation_of_ones_own() -> None:
    rope = Rope(300.0)
    own = make(rope=lambda x, positions: rope.rotate(x, positions))
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 9, D_MODEL)), jnp.float32)
    np.testing.assert_array_equal(own(x), make(rope=rope)(x))
    assert np.abs(np.asarray(own(x)) - np.asarray(make()(x))).max() > 1e-3


def test_rows_do_not_see_beyond_their_length() -> None:
    module = make(sliding_window=3)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 9, D_MODEL)), jnp.float32)
    spoiled = x.at[0, 4:].set(jnp.nan)
    lengths = jnp.array([4, 9])
    out = module(spoiled, lengths=lengths)
    np.testing.assert_allclose(out[0, :4], module(x)[0, :4], rtol=0, atol=1e-6)
    np.testing.assert_allclose(out[1], module(x)[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("tokens", [511, 512, 513, 1100])
def test_long_sequences_are_tiled_without_a_seam(tokens: int, window: int | None) -> None:
    module = make(sliding_window=window)
    x = np.random.default_rng(3).normal(size=(1, tokens, D_MODEL))
    out = run(module, x)
    assert out.shape == (1, tokens, D_MODEL)
    for token in {0, 1, 510, 511, 512, 513, 1023, 1024, tokens - 1} & set(range(tokens)):
        first = max(0, token + 1 - (window or tokens))
        wanted = expected(module, x[0, : token + 1], first, np.arange(token + 1))
        np.testing.assert_allclose(out[0, token], wanted, rtol=0, atol=2e-5)


def test_extreme_scores_stay_finite() -> None:
    module = make(scale=1e6)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 9, D_MODEL)), jnp.float32)
    assert np.isfinite(np.asarray(module(x))).all()


def test_gradients_are_finite_across_tiles() -> None:
    module = make(sliding_window=4)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 530, D_MODEL)), jnp.float32)
    gradient = jax.jit(jax.grad(lambda x: module(x).sum()))(x)
    assert np.isfinite(np.asarray(gradient)).all()


def test_bfloat16_in_and_out() -> None:
    module = make(dtype=jnp.bfloat16, qk_norm_eps=1e-6)
    assert module.q.kernel[...].dtype == jnp.bfloat16
    assert module(jnp.ones((1, 3, D_MODEL), jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 4}, "expected num_heads to be a multiple of num_kv_heads, got 6 and 4"),
        ({"num_kv_heads": 0}, "got 6 and 0"),
        ({"head_dim": 7}, "expected an even head_dim, got 7"),
        ({"sliding_window": 0}, "expected sliding_window of at least 1 token, got 0"),
    ],
)
def test_sizes_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**change)


@pytest.mark.parametrize("options", [{}, {"qkv_bias": True, "qk_norm_eps": 1e-6}])
def test_the_projections_of_one_token_on_a_gpu_are_those_elsewhere(monkeypatch, options):
    """There they are computed for two rows, of which the second is nobody's."""
    module = make(**options)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 1, D_MODEL)), jnp.float32)
    position = jnp.full((1, 1), 7)
    want = module._project(x, position)
    monkeypatch.setattr("fluxion_jax.modules.target_platform", lambda: "gpu")
    got = module._project(x, position)
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("batch", "rows"), [(1, (1, 2)), (3, (3, 1))])
def test_xla_never_has_to_project_one_row_on_a_gpu(batch, rows):
    graph, state = nnx.split(make())

    @jax.jit
    def project(state: Any, x: jax.Array) -> Any:
        return nnx.merge(graph, state)._project(x, jnp.zeros(x.shape[:2], jnp.int32))

    program = traced_for_gpu(project.trace, state, jnp.zeros((batch, 1, D_MODEL)))
    products = [e for e in every_equation(program) if e.primitive.name == "dot_general"]
    assert [e.invars[0].aval.shape for e in products] == [(*rows, D_MODEL)] * 3


def every_equation(jaxpr: Any) -> Any:
    for eqn in jaxpr.eqns:
        yield eqn
        for name in ("jaxpr", "call_jaxpr"):
            if name in eqn.params:
                yield from every_equation(getattr(eqn.params[name], "jaxpr", eqn.params[name]))
