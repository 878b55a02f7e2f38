"""A decoder-only transformer in Flax NNX, configurable to the Llama family and Gemma 3.

It knows nothing of files, tokenizers or sampling. Layers are unrolled in Python, because every
layer owns host arrays that must never be sliced.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fluxion_jax.attention import Execution, LayerStats
from fluxion_jax.cache.host_kv import HostKV
from fluxion_jax.models.config import ModelConfig
from fluxion_jax.modules import Attention, RMSNorm, matmul_precision
from fluxion_jax.policy.protocol import Policy
from fluxion_jax.policy.split import Split


class FeedForward(nnx.Module):
    """The gated feed-forward layer: `down(activation(gate(x)) * up(x))`."""

    def __init__(self, config: ModelConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=False,
                dtype=dtype,
                param_dtype=dtype,
                precision=matmul_precision(dtype),
                rngs=rngs,
            )

        self.gate = linear(config.d_model, config.d_ff)
        self.up = linear(config.d_model, config.d_ff)
        self.down = linear(config.d_ff, config.d_model)
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, T, D]` to `[B, T, D]`."""
        gate = self.gate(x)
        if self.activation == "silu":
            gate = jax.nn.silu(gate)
        else:
            gate = jax.nn.gelu(gate, approximate=True)
        return self.down(gate * self.up(x))


class DecoderLayer(nnx.Module):
    """Attention and feed-forward, each normed before and, in Gemma 3, also behind."""

    def __init__(self, config: ModelConfig, index: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        sliding = index in config.sliding_layers
        rope = config.sliding_rope if sliding and config.sliding_rope else config.rope

        def norm() -> RMSNorm:
            return RMSNorm(config.d_model, eps=config.norm_eps)

        self.attention_norm = norm()
        self.attention = Attention(
            config.d_model,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            rope=rope,
            scale=config.attention_scale,
            qkv_bias=config.qkv_bias,
            out_bias=config.out_bias,
            qk_norm_eps=config.norm_eps if config.qk_norm else None,
            sliding_window=config.sliding_window if sliding else None,
            dtype=dtype,
            rngs=rngs,
        )
        self.attention_post_norm = norm() if config.post_norms else None
        self.feed_forward_norm = norm()
        self.feed_forward = FeedForward(config, dtype=dtype, rngs=rngs)
        self.feed_forward_post_norm = norm() if config.post_norms else None

    def finish(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """What follows attention: residual sums and the feed-forward layer, `[B, T, D]`."""
        if self.attention_post_norm is not None:
            attended = self.attention_post_norm(attended)
        x = x + attended
        y = self.feed_forward(self.feed_forward_norm(x))
        if self.feed_forward_post_norm is not None:
            y = self.feed_forward_post_norm(y)
        return x + y


class Decoder(nnx.Module):
    """Embedding, layers, final norm and output layer.

    Axes: B batch, S or T tokens, V vocabulary, L layers.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        """Creates a randomly initialised model.

        Args:
          config: sizes and switches.
          rngs: source of the initial parameters.
          dtype: dtype of parameters and activations; norms compute in float32.
        """

        def table() -> nnx.Param[jax.Array]:
            values = jax.random.normal(rngs.params(), (config.vocab_size, config.d_model), dtype)
            return nnx.Param(values * jnp.asarray(config.d_model**-0.5, dtype))

        self.embedding = table()
        self.layers = nnx.List(
            [
                DecoderLayer(config, index, dtype=dtype, rngs=rngs)
                for index in range(config.num_layers)
            ]
        )
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.output = None if config.tied_embeddings else table()
        self.config = config

    @classmethod
    def random(cls, config: ModelConfig, seed: int = 0, *, dtype: Any = jnp.float32) -> Decoder:
        """A randomly initialised model that depends on nothing but its arguments."""
        return cls(config, rngs=nnx.Rngs(seed), dtype=dtype)

    def __call__(self, tokens: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        """Dense attention over whole sequences; shares nothing with the cache.

        Args:
          tokens: int32 `[B, S]`.
          lengths: int32 `[B]`, valid tokens of each row; None means S.

        Returns:
          float32 logits `[B, S, V]`; rows behind `lengths` are unspecified.
        """
        x = self._embed(tokens)
        for layer in self.layers:
            x = layer.finish(x, layer.attention(layer.attention_norm(x), lengths=lengths))
        return self._logits(x)

    def prefill_chunk(
        self, tokens: jax.Array, count: jax.Array, cache: HostKV, *, execution: Any = None
    ) -> tuple[jax.Array, HostKV]:
        """Reads the next tokens of each sequence into the cache.

        Args:
          tokens: int32 `[B, T]`.
          count: int32 `[B]`, valid tokens of each row, 0 to T.
          cache: the host KV cache.
          execution: which implementations run; None for the best available.

        Returns:
          float32 logits `[B, V]` behind each row's last valid token (unspecified where `count` is
          0), and the cache, longer by `count`.
        """
        x = self._embed(tokens)
        for index, layer in enumerate(self.layers):
            attended, cache = layer.attention.prefill(
                layer.attention_norm(x), count, cache, index, execution=execution
            )
            x = layer.finish(x, attended)
        last = jnp.maximum(count - 1, 0)[:, None, None]
        logits = self._logits(jnp.take_along_axis(x, last, axis=1))
        return logits[:, 0], cache.note_non_finite(logits, count > 0).advance(count)

    def decode_step(
        self,
        tokens: jax.Array,
        cache: HostKV,
        policy: Policy,
        *,
        split: Split,
        execution: Execution | None = None,
        return_selection: bool = False,
    ) -> tuple[jax.Array, HostKV, LayerStats | None]:
        """Reads one token per row and predicts the next.

        Args:
          tokens: int32 `[B]`.
          cache: the host KV cache.
          policy: decides how finely and how much of the cache each head reads.
          split: how the work is shared between host and device.
          execution: which implementations run; None for the best available.
          return_selection: also return what was selected, in the statistics.

        Returns:
          float32 logits `[B, V]`; the cache, longer by one token in active rows; the statistics of
          the layers that attend to everything, stacked along a new first axis (None if there is
          no such layer).
        """
        x = self._embed(tokens[:, None])
        collected = []
        for index, layer in enumerate(self.layers):
            attended, cache, stats = layer.attention.decode(
                layer.attention_norm(x),
                cache,
                index,
                policy,
                split=split,
                execution=execution,
                return_selection=return_selection,
            )
            x = layer.finish(x, attended)
            if stats is not None:
                collected.append(stats)
        stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *collected) if collected else None
        logits = self._logits(x)[:, 0]
        return logits, cache.note_non_finite(logits, cache.active).advance(), stacked

    def _embed(self, tokens: jax.Array) -> jax.Array:
        x = self.embedding[...][tokens]
        if self.config.scale_embeddings:
            x = x * jnp.asarray(math.sqrt(self.config.d_model), x.dtype)
        return x

    def _logits(self, x: jax.Array) -> jax.Array:
        table = self.embedding if self.output is None else self.output
        x = self.norm(x)
        return jnp.einsum(
            "btd,vd->btv",
            x,
            table[...],
            precision=matmul_precision(x.dtype),
            preferred_element_type=jnp.float32,
        )
