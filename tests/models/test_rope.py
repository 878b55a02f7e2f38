from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from fluxion_jax.errors import ConfigError
from fluxion_jax.rope import Rope


def test_rotation_is_a_complex_product_of_the_two_halves() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 8))
    positions = np.array([[0, 1, 2, 3, 4], [100, 7, 7, 9000, 1]], np.int32)
    frequencies = 500.0 ** -(np.arange(4) / 4)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[:, :, None, None] * frequencies)
    rotated = Rope(500.0).rotate(jnp.asarray(x, jnp.float32), jnp.asarray(positions))
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(rotated, expected, rtol=0, atol=2e-3)
    np.testing.assert_allclose(rotated[0], expected[0], rtol=0, atol=1e-6)


def test_scores_depend_on_distance_only() -> None:
    rng = np.random.default_rng(1)
    q, k = jnp.asarray(rng.normal(size=(2, 1, 1, 1, 16)), jnp.float32)
    rope = Rope.linear(1e4, 4.0)

    def score(query_position: int, key_position: int) -> float:
        at = lambda x, p: rope.rotate(x, jnp.array([[p]], jnp.int32))  # noqa: E731
        return float(jnp.sum(at(q, query_position) * at(k, key_position)))

    assert score(50, 40) == pytest.approx(score(510, 500), abs=1e-3)
    assert score(50, 40) != pytest.approx(score(50, 30), abs=1e-3)


def test_linear_scaling_is_interpolation() -> None:
    x = jnp.ones((1, 1, 1, 16))
    scaled = Rope.linear(1e4, 8.0).rotate(x, jnp.array([[80]]))
    plain = Rope(1e4).rotate(x, jnp.array([[10]]))
    np.testing.assert_allclose(scaled, plain, atol=1e-6)


def test_llama3_scaling_keeps_short_and_divides_long_wavelengths() -> None:
    rope = Rope.llama3(
        500000.0,
        128,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_context_tokens=8192,
    )
    plain = Rope(500000.0).frequencies(128)
    wavelengths = 2 * np.pi / plain
    ratio = plain / rope.frequencies(128)
    np.testing.assert_array_equal(ratio[wavelengths < 8192 / 4], 1.0)
    np.testing.assert_allclose(ratio[wavelengths > 8192], 8.0, rtol=1e-6)
    between = (wavelengths > 8192 / 4) & (wavelengths < 8192)
    assert between.any()
    assert np.all((ratio[between] > 1) & (ratio[between] < 8))


def test_dtype_is_kept() -> None:
    x = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
    assert Rope().rotate(x, jnp.zeros((1, 2), jnp.int32)).dtype == jnp.bfloat16


def test_values_out_of_range() -> None:
    with pytest.raises(ConfigError, match="expected a RoPE theta above 0, got 0"):
        Rope(0)
    with pytest.raises(ConfigError, match="expected finite RoPE divisors above 0"):
        Rope.linear(1e4, 0.0)
    with pytest.raises(ConfigError, match="expected 0, 1 or 4 RoPE divisors for head size 8"):
        Rope(1e4, (1.0, 2.0)).frequencies(8)
    with pytest.raises(ConfigError, match="expected high_freq_factor above low_freq_factor"):
        Rope.llama3(
            1e4,
            8,
            factor=2,
            low_freq_factor=4,
            high_freq_factor=1,
            original_context_tokens=64,
        )
