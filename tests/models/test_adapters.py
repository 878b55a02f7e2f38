"""Decoders of other projects through the cache, against their own full path."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fluxion_jax as fx
from fluxion_jax.adapters import AdaptedDecoder, adapt, adapt_qwen3
from fluxion_jax.modules import Attention
from tests.models.qwen3_style import VOCAB, Config, Qwen3

TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 420))
EVERYTHING = fx.Execution(dense_below_tokens=0, measure=True)


def through_the_cache(model: AdaptedDecoder, tokens: np.ndarray, known: int) -> np.ndarray:
    """Log-probabilities `[B, S - known - 1, V]` behind prefill and decode steps with everything."""
    layout = dataclasses.replace(
        model.config.kv_layout("float32"), sink_tokens=16, recent_tokens=32
    )
    cache = fx.HostKV.allocate(layout, tokens.shape[0], tokens.shape[1])
    fx.prefill(model, tokens[:, :known], cache, chunk_tokens=128, progress=False)
    scores = fx.score(model, cache, tokens[:, known:], split=0.5, execution=EVERYTHING)
    return scores.distributions


@pytest.mark.parametrize("config", [Config(), Config(tied=True), Config(plain_table=True)], ids=str)
def test_a_qwen3_of_another_project_gives_its_own_logits(config: Config) -> None:
    theirs = Qwen3(nnx.Rngs(3), config)
    before = jax.tree.map(jnp.array, nnx.state(theirs))
    expected = jax.nn.log_softmax(nnx.jit(lambda m, t: m(t))(theirs, jnp.asarray(TOKENS)))
    model = adapt_qwen3(theirs)
    got = through_the_cache(model, TOKENS, 399)
    np.testing.assert_allclose(got, expected[:, 399:-1], rtol=0, atol=1e-4)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, before, nnx.state(theirs)))
    # Enough to notice a wrong position, norm or scale.
    assert np.abs(np.asarray(expected[:, 399:-1]) - np.asarray(expected[:, 398:-2])).max() > 0.5


def test_generation_is_greedy_decoding_of_the_model_itself() -> None:
    theirs = Qwen3(nnx.Rngs(4), Config())
    model = adapt_qwen3(theirs)
    prompt = TOKENS[0, :390].tolist()
    result = fx.generate(model, prompt, max_new_tokens=5, progress=False)
    row, full = list(prompt), nnx.jit(lambda m, t: m(t))
    for token in result.tokens[0]:
        padded = np.zeros((1, 400), np.int32)
        padded[0, : len(row)] = row
        assert int(jnp.argmax(full(theirs, jnp.asarray(padded))[0, len(row) - 1])) == token
        row.append(int(token))


def test_configurations_that_cannot_be_hashed_are_told_apart() -> None:
    """Equal ones share a program, and a model does not run in the program of another."""

    def logits(theirs: Qwen3) -> np.ndarray:
        model = adapt_qwen3(theirs)
        cache = fx.HostKV.allocate(model.config.kv_layout("float32"), 1, 420)
        return fx.prefill(model, TOKENS[:1, :20], cache, chunk_tokens=128, progress=False)

    first = [logits(Qwen3(nnx.Rngs(seed), Config())) for seed in (4, 4, 5)]
    np.testing.assert_array_equal(first[0], first[1])
    assert np.abs(first[0] - first[2]).max() > 0.1
    theirs = Qwen3(nnx.Rngs(4), Config(tied=True))
    own = theirs(jnp.asarray(TOKENS[:1, :20]))[:, -1]
    np.testing.assert_allclose(logits(theirs), own, rtol=0, atol=1e-4)


def test_what_is_no_such_qwen3_is_refused_by_the_part_it_lacks() -> None:
    theirs = Qwen3(nnx.Rngs(4), Config())
    del theirs.layers[0].attn.k_norm
    with pytest.raises(fx.ConfigError, match=r"with the part `layers\[0\]\.attn\.k_norm`"):
        adapt_qwen3(theirs)
    with pytest.raises(fx.ConfigError, match="with the part `embedder`, got a Windows"):
        adapt_qwen3(Windows(nnx.Rngs(0)))


class Windows(nnx.Module):
    """A decoder with learned positions, a fused projection, a scale of its own and a window."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.tokens, self.places = nnx.Embed(50, 12, rngs=rngs), nnx.Embed(500, 12, rngs=rngs)
        self.fused = nnx.List([nnx.Linear(12, 48, rngs=rngs, precision="highest") for _ in "ab"])
        self.out = nnx.List([nnx.Linear(16, 12, rngs=rngs, precision="highest") for _ in "ab"])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        count = tokens.shape[1]
        behind = jnp.arange(count)[:, None] - jnp.arange(count)
        x = self.tokens(tokens) + self.places(jnp.arange(count))
        for index, (fused, out) in enumerate(zip(self.fused, self.out, strict=True)):
            q, k, v = jnp.split(fused(x).reshape(*x.shape[:2], 6, 8), 3, axis=2)
            scores = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest") * 0.9
            seen = (behind >= 0) & ((behind < 20) | (index == 0))
            weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
            attended = jnp.einsum("bnts,bsnh->btnh", weights, v, precision="highest")
            x = x + out(attended.reshape(*x.shape[:2], 16))
        return self.tokens.attend(x)


def _split(layer: Any, x: jax.Array, _: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(jnp.split(layer[0](x).reshape(*x.shape[:2], 6, 8), 3, axis=2))


PARTS: dict[str, Any] = {
    "embed": lambda m, tokens, positions: m.tokens(tokens) + m.places(positions),
    "layers": lambda m: list(zip(m.fused, m.out, strict=True)),
    "qkv": _split,
    "finish": lambda layer, x, attended: x + layer[1](attended.reshape(*x.shape[:2], 16)),
    "logits": lambda m, x: m.tokens.attend(x),
}


def test_any_decoder_from_its_five_parts() -> None:
    theirs = Windows(nnx.Rngs(0))
    tokens = TOKENS % 50
    expected = jax.nn.log_softmax(theirs(jnp.asarray(tokens)))
    model = adapt(theirs, **PARTS, scale=0.9, sliding_window=20, sliding_layers=(1,))
    assert (model.config.vocab_size, model.config.num_kv_heads, model.config.head_dim) == (50, 2, 8)
    got = through_the_cache(model, tokens, 399)
    np.testing.assert_allclose(got, expected[:, 399:-1], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"qkv": lambda layer, x, p: tuple(y.swapaxes(1, 2) for y in _split(layer, x, p))},
            "expected qkv to return q",
        ),
        ({"logits": lambda m, x: m.tokens.attend(x)[:, 0]}, r"and \(1, 50\) for B=1, T=13, D=12"),
        ({"logits": lambda m, x: m.tokens.attend(x).swapaxes(0, 1)}, r"and \(13, 1, 50\) for"),
        ({"logits": lambda m, x: m.tokens.attend(x).swapaxes(1, 2)}, r"and \(1, 50, 13\) for"),
        ({"logits": lambda m, x: (m.tokens.attend(x), 0)}, r"\(1, 13, 12\) and tuple for"),
        ({"finish": lambda layer, x, attended: x[:, -1:]}, r"\[B, T, D\] .* got \(1, 1, 12\) and"),
        ({"finish": lambda layer, x, attended: x[..., :8]}, r"got \(1, 13, 8\) and"),
        ({"finish": lambda layer, x, attended: (x, None)}, r"got tuple and \(1, 13, 50\)"),
        (
            {
                "embed": lambda m, tokens, p: m.tokens(tokens)[:, :, None],
                "qkv": lambda layer, x, p: _split(layer, x[:, :, 0], p),
            },
            r"expected embed to return \[B, T, D\], got \(1, 13, 1, 12\)",
        ),
        ({"sliding_layers": (7,)}, "sliding_layers"),
    ],
)
def test_parts_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(fx.ConfigError, match=message):
        adapt(Windows(nnx.Rngs(0)), **{**PARTS, "sliding_window": 20, **change})


def test_attention_in_linen_through_the_bridge() -> None:
    """The module's three ways to attend are methods that Linen can name."""
    linen = nnx.bridge.ToLinen(Attention, args=(16, 4, 2, 8))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 40, 16)), jnp.float32)
    variables = linen.init(jax.random.key(0), x)
    expected = linen.apply(variables, x)
    layout = fx.KVLayout(1, 2, 8, "float32", sink_tokens=0, recent_tokens=16)
    cache = fx.HostKV.allocate(layout, 1, 64)

    @fx.jit
    def prefill(variables, cache, x, count):
        out, cache = linen.apply(variables, x, count, cache, 0, nnx_method="prefill")
        return out, cache.advance(count)

    @fx.jit
    def decode(variables, cache, x, policy, split):
        out, cache, _ = linen.apply(
            variables, x, cache, 0, policy, split=split, nnx_method="decode"
        )
        return out, cache.advance()

    from fluxion_jax.policy import split_at

    out, cache = prefill(variables, cache, x[:, :39], jnp.asarray([39]))
    np.testing.assert_allclose(out, expected[:, :39], rtol=0, atol=1e-5)
    out, cache = decode(variables, cache, x[:, 39:], fx.full(), split_at(0.5))
    np.testing.assert_allclose(out, expected[:, 39:], rtol=0, atol=1e-5)
    cache.check()
