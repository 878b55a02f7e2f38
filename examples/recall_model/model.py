"""The trained decoder: Qwen3's layout in Flax NNX, float32 parameters and bfloat16 arithmetic."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fluxion_jax.rope import Rope


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the decoder; the defaults give 12.2 M parameters."""

    vocab_size: int = 4096
    d_model: int = 384
    num_layers: int = 6
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 64
    d_ff: int = 1024
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-6
    max_context_tokens: int = 32_768

    def hf_config(self) -> dict[str, Any]:
        """The `config.json` of a Hugging Face directory."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": self.vocab_size,
            "hidden_size": self.d_model,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.d_ff,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_context_tokens,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "eos_token_id": 0,
        }


def _matrix(rngs: nnx.Rngs, inputs: int, outputs: int, std: float) -> nnx.Param[jax.Array]:
    return nnx.Param(std * jax.random.normal(rngs.params(), (inputs, outputs), jnp.float32))


def _normed(x: jax.Array, scale: Any, eps: float) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale[...]).astype(x.dtype)


class Layer(nnx.Module):
    """Attention and feed-forward, each normed before; q, k, v and gate, up in one matrix each."""

    def __init__(self, sizes: Sizes, rngs: nnx.Rngs) -> None:
        queries, keys = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
        into_residual = 0.02 * (2 * sizes.num_layers) ** -0.5
        self.qkv = _matrix(rngs, sizes.d_model, queries + 2 * keys, 0.02)
        self.o = _matrix(rngs, queries, sizes.d_model, into_residual)
        self.gate_up = _matrix(rngs, sizes.d_model, 2 * sizes.d_ff, 0.02)
        self.down = _matrix(rngs, sizes.d_ff, sizes.d_model, into_residual)
        self.attention_norm = nnx.Param(jnp.ones(sizes.d_model))
        self.feed_forward_norm = nnx.Param(jnp.ones(sizes.d_model))
        self.q_norm = nnx.Param(jnp.ones(sizes.head_dim))
        self.k_norm = nnx.Param(jnp.ones(sizes.head_dim))
        self.sizes = sizes

    def __call__(self, x: jax.Array, positions: jax.Array, implementation: str) -> jax.Array:
        sizes, (batch, length, _), dtype = self.sizes, x.shape, x.dtype
        queries, keys = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
        y = _normed(x, self.attention_norm, sizes.norm_eps) @ self.qkv[...].astype(dtype)
        q, k, v = (
            part.reshape(batch, length, -1, sizes.head_dim)
            for part in jnp.split(y, [queries, queries + keys], axis=-1)
        )
        rope = Rope(sizes.rope_theta)
        q = rope.rotate(_normed(q, self.q_norm, sizes.norm_eps), positions)
        k = rope.rotate(_normed(k, self.k_norm, sizes.norm_eps), positions)
        attended = jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation=implementation
        )
        x = x + attended.reshape(batch, length, queries) @ self.o[...].astype(dtype)
        y = _normed(x, self.feed_forward_norm, sizes.norm_eps) @ self.gate_up[...].astype(dtype)
        gate, up = jnp.split(y, 2, axis=-1)
        return x + (jax.nn.silu(gate) * up) @ self.down[...].astype(dtype)


class RecallModel(nnx.Module):
    """Embedding, layers, final norm; the output layer is the embedding."""

    def __init__(self, sizes: Sizes, rngs: nnx.Rngs) -> None:
        self.embedding = _matrix(rngs, sizes.vocab_size, sizes.d_model, 0.02)
        self.layers = nnx.List([Layer(sizes, rngs) for _ in range(sizes.num_layers)])
        self.norm = nnx.Param(jnp.ones(sizes.d_model))
        self.sizes = sizes

    def __call__(
        self, tokens: jax.Array, *, dtype: Any = jnp.bfloat16, implementation: str = "xla"
    ) -> jax.Array:
        """float32 logits `[B, S, V]` of int32 tokens `[B, S]`."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        table = self.embedding[...].astype(dtype)
        x = table[tokens]
        for layer in self.layers:
            x = layer(x, positions, implementation)
        x = _normed(x, self.norm, self.sizes.norm_eps)
        return jnp.einsum("btd,vd->btv", x, table, preferred_element_type=jnp.float32)


def hf_tensors(model: RecallModel) -> dict[str, jax.Array]:
    """The parameters under Hugging Face's names, matrices as `[out, in]`."""
    sizes = model.sizes
    queries, keys = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    named = {
        "model.embed_tokens.weight": model.embedding[...],
        "model.norm.weight": model.norm[...],
    }
    for index, layer in enumerate(model.layers):
        at = f"model.layers.{index}."
        q, k, v = jnp.split(layer.qkv[...], [queries, queries + keys], axis=1)
        gate, up = jnp.split(layer.gate_up[...], 2, axis=1)
        for name, matrix in (
            ("self_attn.q_proj", q),
            ("self_attn.k_proj", k),
            ("self_attn.v_proj", v),
            ("self_attn.o_proj", layer.o[...]),
            ("mlp.gate_proj", gate),
            ("mlp.up_proj", up),
            ("mlp.down_proj", layer.down[...]),
        ):
            named[f"{at}{name}.weight"] = matrix.T
        for name, scale in (
            ("self_attn.q_norm", layer.q_norm),
            ("self_attn.k_norm", layer.k_norm),
            ("input_layernorm", layer.attention_norm),
            ("post_attention_layernorm", layer.feed_forward_norm),
        ):
            named[f"{at}{name}.weight"] = scale[...]
    return named


def from_hf_tensors(sizes: Sizes, tensors: dict[str, jax.Array]) -> RecallModel:
    """The model of `hf_tensors`, in float32."""
    model = RecallModel(sizes, nnx.Rngs(0))

    def joined(*names: str) -> jax.Array:
        return jnp.concatenate([tensors[n].T for n in names], axis=1).astype(jnp.float32)

    def scale(name: str) -> jax.Array:
        return tensors[name].astype(jnp.float32)

    model.embedding[...] = scale("model.embed_tokens.weight")
    model.norm[...] = scale("model.norm.weight")
    for index, layer in enumerate(model.layers):
        at = f"model.layers.{index}."
        layer.qkv[...] = joined(*(f"{at}self_attn.{x}_proj.weight" for x in "qkv"))
        layer.o[...] = joined(f"{at}self_attn.o_proj.weight")
        layer.gate_up[...] = joined(f"{at}mlp.gate_proj.weight", f"{at}mlp.up_proj.weight")
        layer.down[...] = joined(f"{at}mlp.down_proj.weight")
        layer.q_norm[...] = scale(f"{at}self_attn.q_norm.weight")
        layer.k_norm[...] = scale(f"{at}self_attn.k_norm.weight")
        layer.attention_norm[...] = scale(f"{at}input_layernorm.weight")
        layer.feed_forward_norm[...] = scale(f"{at}post_attention_layernorm.weight")
    return model
