"""A decoder as other projects write it: heads as an axis of einsums, its own attention and mask.

Its embeddings are a module of its own with `encode` and `decode`, or an `nnx.Embed` of which it
reads the table, for that would round to its `dtype`. Its configuration cannot be hashed.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

VOCAB, WIDTH, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 96, 24, 6, 2, 16, 2


class Contraction(nnx.Module):
    def __init__(self, equation: str, shape: tuple[int, ...], rngs: nnx.Rngs) -> None:
        self.equation = equation
        size = shape[0] if len(shape) == 3 and "NH->" not in equation else WIDTH
        self.w = nnx.Param(jax.random.normal(rngs.params(), shape) * size**-0.5)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.einsum(self.equation, x, self.w[...], precision="highest")


class Norm(nnx.Module):
    def __init__(self, size: int, rngs: nnx.Rngs) -> None:
        self.w = nnx.Param(1 + 0.2 * jax.random.normal(rngs.params(), (size,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.w[...] * x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


class Embedder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.table = nnx.Param(jax.random.normal(rngs.params(), (VOCAB, WIDTH)))

    def encode(self, tokens: jax.Array) -> jax.Array:
        return self.table[...][tokens]

    def decode(self, x: jax.Array) -> jax.Array:
        return jnp.einsum("btd,vd->btv", x, self.table[...], precision="highest")


def turn(x: jax.Array, positions: jax.Array) -> jax.Array:
    half = x.shape[-1] // 2
    angle = positions[..., None, None] / 1e6 ** (jnp.arange(half) / half)
    pair = jax.lax.complex(x[..., :half], x[..., half:]) * jnp.exp(1j * angle)
    return jnp.concatenate([pair.real, pair.imag], axis=-1)


class Attention(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.q_proj = Contraction("btd,dnh->btnh", (WIDTH, HEADS, HEAD_DIM), rngs)
        self.k_proj = Contraction("btd,dkh->btkh", (WIDTH, KV_HEADS, HEAD_DIM), rngs)
        self.v_proj = Contraction("btd,dkh->btkh", (WIDTH, KV_HEADS, HEAD_DIM), rngs)
        self.o_proj = Contraction("btnh,nhd->btd", (HEADS, HEAD_DIM, WIDTH), rngs)
        self.q_norm, self.k_norm = Norm(HEAD_DIM, rngs), Norm(HEAD_DIM, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, tokens, _ = x.shape
        positions = jnp.broadcast_to(jnp.arange(tokens), (batch, tokens))
        q = turn(self.q_norm(self.q_proj(x)), positions)
        k = turn(self.k_norm(self.k_proj(x)), positions)
        k, v = (jnp.repeat(y, HEADS // KV_HEADS, axis=2) for y in (k, self.v_proj(x)))
        scores = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest") / HEAD_DIM**0.5
        scores = jnp.where(jnp.tri(tokens, dtype=bool), scores, -1e30)
        weights = jax.nn.softmax(scores, axis=-1)
        return self.o_proj(jnp.einsum("bnts,bsnh->btnh", weights, v, precision="highest"))


class FeedForward(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(WIDTH, 40, rngs=rngs, precision="highest")
        self.down = nnx.Linear(40, WIDTH, rngs=rngs, precision="highest")

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.up(x)))


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.input_layernorm = Norm(WIDTH, rngs)
        self.attn = Attention(rngs)
        self.post_attention_layernorm = Norm(WIDTH, rngs)
        self.mlp = FeedForward(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


@dataclasses.dataclass
class Config:
    tied: bool = False
    plain_table: bool = False


class Qwen3(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, config: Config) -> None:
        self.config = config
        self.embedder = (
            nnx.Embed(VOCAB, WIDTH, dtype=jnp.bfloat16, rngs=rngs)
            if config.plain_table
            else Embedder(rngs)
        )
        self.layers = nnx.List([Layer(rngs) for _ in range(LAYERS)])
        self.final_norm = Norm(WIDTH, rngs)
        if not config.tied:
            self.lm_head = Contraction("btd,dv->btv", (WIDTH, VOCAB), rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        table = self.config.plain_table
        x = self.embedder.embedding[...][tokens] if table else self.embedder.encode(tokens)
        for layer in self.layers:
            x = layer(x)
        x = self.final_norm(x)
        return self.lm_head(x) if hasattr(self, "lm_head") else self.embedder.decode(x)
