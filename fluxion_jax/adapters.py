"""Decoders of other projects, as they are: an adapter says how their layers compute.

There is no common hook for attention among Flax models, but all decoders have the same five parts.
Given as functions of the model, they are enough for prefill and decoding with a host-resident
cache; neither the model nor its class is changed, and its parameters are used where they lie.
Axes: B batch, T tokens, D model width, N query heads, K KV heads, H head size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from fluxion_jax.attention import Execution, LayerStats, decode_attention
from fluxion_jax.cache.host_kv import HostKV
from fluxion_jax.cache.layout import KVLayout
from fluxion_jax.chunk_attention import prefill_attention
from fluxion_jax.errors import ConfigError, require, require_number
from fluxion_jax.policy.protocol import Policy
from fluxion_jax.policy.split import Split
from fluxion_jax.rope import Rope
from fluxion_jax.sliding import sliding_decode_attention, sliding_prefill_attention

QKV = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What `generate` and the cache need to know of an adapted model.

    Attributes:
      vocab_size: V.
      num_layers: decoder layers.
      num_heads: N.
      num_kv_heads: K.
      head_dim: H.
      sliding_window: tokens that a sliding-window layer sees, or None.
      sliding_layers: indices of these layers.
    """

    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None
    sliding_layers: tuple[int, ...]

    def kv_layout(
        self,
        dtype: str = "bfloat16",
        summaries: Literal["host", "device"] = "host",
        *,
        sketch: bool = False,
    ) -> KVLayout:
        """The layout of a KV cache for this model; see `ModelConfig.kv_layout`."""
        return KVLayout(
            self.num_layers,
            self.num_kv_heads,
            self.head_dim,
            dtype=dtype,
            summaries=summaries,
            sliding_window=self.sliding_window,
            sliding_layers=self.sliding_layers,
            num_heads=self.num_heads,
            sketch=sketch,
        )


class AdaptedDecoder(nnx.Module):
    """A decoder of another project that `generate`, `prefill` and `score` take; see `adapt`."""

    def __init__(
        self,
        model: nnx.Module,
        embed: Callable[[Any, jax.Array, jax.Array], jax.Array],
        layers: Callable[[Any], Sequence[Any]],
        qkv: Callable[[Any, jax.Array, jax.Array], QKV],
        finish: Callable[[Any, jax.Array, jax.Array], jax.Array],
        logits: Callable[[Any, jax.Array], jax.Array],
        scale: float,
        config: AdapterConfig,
    ) -> None:
        self.model = model
        self.embed, self.layers, self.qkv = embed, layers, qkv
        self.finish, self.logits = finish, logits
        self.scale = scale
        self.config = config

    def prefill_chunk(
        self, tokens: jax.Array, count: jax.Array, cache: HostKV, *, execution: Any = None
    ) -> tuple[jax.Array, HostKV]:
        """Reads the next tokens of each sequence into the cache; see `Decoder.prefill_chunk`."""
        host = execution.host if execution else None
        positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        x = self.embed(self.model, tokens, positions)
        for index, layer in enumerate(self.layers(self.model)):
            q, k, v = self.qkv(layer, x, positions)
            if index in self.config.sliding_layers:
                attended, cache = sliding_prefill_attention(
                    q, k, v, count, cache, index, self._window, scale=self.scale
                )
            else:
                attended, cache = prefill_attention(
                    q, k, v, count, cache, index, scale=self.scale, implementation=host
                )
            x = self.finish(layer, x, attended)
        last = jnp.maximum(count - 1, 0)[:, None, None]
        logits = self._logits(jnp.take_along_axis(x, last, axis=1))
        return logits, cache.note_non_finite(logits, count > 0).advance(count)

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
        """Reads one token per row and predicts the next; see `Decoder.decode_step`."""
        positions = cache.lengths[:, None]
        x = self.embed(self.model, tokens[:, None], positions)
        collected = []
        for index, layer in enumerate(self.layers(self.model)):
            q, k, v = (y[:, 0] for y in self.qkv(layer, x, positions))
            if index in self.config.sliding_layers:
                attended, cache = sliding_decode_attention(
                    q, k, v, cache, index, self._window, scale=self.scale
                )
            else:
                attended, cache, stats = decode_attention(
                    q,
                    k,
                    v,
                    cache,
                    index,
                    policy,
                    scale=self.scale,
                    split=split,
                    execution=execution,
                    return_selection=return_selection,
                )
                collected.append(stats)
            x = self.finish(layer, x, attended[:, None])
        stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *collected) if collected else None
        logits = self._logits(x)
        return logits, cache.note_non_finite(logits, cache.active).advance(), stacked

    @property
    def _window(self) -> int:
        assert self.config.sliding_window is not None
        return self.config.sliding_window

    def _logits(self, x: jax.Array) -> jax.Array:
        """float32 `[B, V]` behind one token of each row, `[B, 1, D]`."""
        return self.logits(self.model, x)[:, 0].astype(jnp.float32)


def adapt(
    model: nnx.Module,
    *,
    embed: Callable[[Any, jax.Array, jax.Array], jax.Array],
    layers: Callable[[Any], Sequence[Any]],
    qkv: Callable[[Any, jax.Array, jax.Array], QKV],
    finish: Callable[[Any, jax.Array, jax.Array], jax.Array],
    logits: Callable[[Any, jax.Array], jax.Array],
    scale: float | None = None,
    sliding_window: int | None = None,
    sliding_layers: Sequence[int] = (),
) -> AdaptedDecoder:
    """Makes a decoder of another project one that `generate` takes, from five of its parts.

    Args:
      model: the Flax NNX decoder; it is not changed.
      embed: `(model, tokens int32 [B, T], positions int32 [B, T]) -> [B, T, D]`.
      layers: `(model) -> layers`, in their order.
      qkv: `(layer, x [B, T, D], positions int32 [B, T]) -> (q [B, T, N, H], k [B, T, K, H],
        v [B, T, K, H])`: what precedes attention, norms and rotary embedding included, scaling not.
      finish: `(layer, x [B, T, D], attended [B, T, N, H]) -> [B, T, D]`: what follows attention,
        from the output projection to the end of the layer, residual sums included.
      logits: `(model, x [B, T, D]) -> [B, T, V]`.
      scale: factor of the attention scores; None means `H ** -0.5`.
      sliding_window: tokens that a query of a sliding-window layer sees, itself included.
      sliding_layers: indices of these layers.

    Returns:
      A decoder that `generate`, `prefill`, `score` and `stream` take.

    Raises:
      ConfigError: a part is no function or returns other shapes, or a window has no layers.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import fluxion_jax as fx
      >>> class Layer(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.qkv = nnx.LinearGeneral(16, (3, 2, 8), rngs=rngs)
      ...         self.out = nnx.LinearGeneral((2, 8), 16, axis=(-2, -1), rngs=rngs)
      >>> class Theirs(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.tokens = nnx.Embed(32, 16, rngs=rngs)
      ...         self.layers = nnx.List([Layer(rngs), Layer(rngs)])
      >>> model = fx.adapt(
      ...     Theirs(nnx.Rngs(0)),
      ...     embed=lambda model, tokens, positions: model.tokens(tokens),
      ...     layers=lambda model: model.layers,
      ...     qkv=lambda layer, x, positions: tuple(jnp.moveaxis(layer.qkv(x), 2, 0)),
      ...     finish=lambda layer, x, attended: x + layer.out(attended),
      ...     logits=lambda model, x: model.tokens.attend(x),
      ... )
      >>> print(model.config.kv_layout().num_layers)
      2
      >>> len(fx.generate(model, [1, 2, 3], max_new_tokens=4).tokens[0])
      4
    """
    require("model", model, nnx.Module, "adapt one of Flax NNX")
    for name, part in (
        ("embed", embed),
        ("layers", layers),
        ("qkv", qkv),
        ("finish", finish),
        ("logits", logits),
    ):
        if not callable(part):
            raise ConfigError(f"expected a function as {name}, got {type(part).__name__}")
    # An unlikely number of heads, so that exchanged axes show.
    rows = (1, 13)
    tokens = jax.ShapeDtypeStruct(rows, jnp.int32)

    if not len(layers(model)):
        raise ConfigError("expected at least one layer, got none; correct `layers`")
    if scale is not None:
        require_number("a scale", scale, "None for H ** -0.5")
    if not isinstance(sliding_layers, Sequence):
        raise ConfigError(f"expected a list of layers as sliding_layers, got {sliding_layers!r}")

    def projected(tokens: jax.Array) -> Any:
        x = embed(model, tokens, tokens)
        return qkv(layers(model)[0], x, tokens)

    found = nnx.eval_shape(projected, tokens)
    if not isinstance(found, tuple | list) or len(found) != 3:
        raise ConfigError(
            f"expected qkv to return three arrays q, k and v, got {jax.tree.structure(found)}; "
            "return a tuple"
        )
    q, k, v = found
    fits = len(q.shape) == len(k.shape) == 4 and k.shape == v.shape
    if not fits or q.shape[:2] != rows or k.shape[:2] != rows or q.shape[3] != k.shape[3]:
        raise ConfigError(
            "expected qkv to return q [B, T, N, H], k and v [B, T, K, H], got "
            f"{q.shape}, {k.shape} and {v.shape} for B=1, T=13; put heads before the head size"
        )

    def one_layer(tokens: jax.Array) -> tuple[Any, Any, Any]:
        x = embed(model, tokens, tokens)
        layer = layers(model)[0]
        return x, finish(layer, x, qkv(layer, x, tokens)[0]), logits(model, x)

    x, after, behind = nnx.eval_shape(one_layer, tokens)
    embedded, finished, predicted = (
        getattr(y, "shape", type(y).__name__) for y in (x, after, behind)
    )
    if len(embedded) != 3 or embedded[:2] != rows:
        raise ConfigError(f"expected embed to return [B, T, D], got {embedded} for B=1, T=13")
    if finished != embedded or len(predicted) != 3 or predicted[:2] != rows:
        raise ConfigError(
            "expected finish to return [B, T, D] and logits [B, T, V], got "
            f"{finished} and {predicted} for B=1, T=13, D={embedded[2]}"
        )
    if sliding_window is not None and not sliding_layers:
        raise ConfigError(
            f"expected sliding_layers for a sliding_window of {sliding_window}, got none; say "
            "which layers have it"
        )
    config = AdapterConfig(
        vocab_size=behind.shape[-1],
        num_layers=len(layers(model)),
        num_heads=q.shape[2],
        num_kv_heads=k.shape[2],
        head_dim=q.shape[3],
        sliding_window=sliding_window,
        sliding_layers=tuple(sliding_layers),
    )
    config.kv_layout()
    if scale is None:
        scale = config.head_dim**-0.5
    return AdaptedDecoder(model, embed, layers, qkv, finish, logits, scale, config)


def adapt_qwen3(model: nnx.Module, *, rope: Rope | None = None) -> AdaptedDecoder:
    """Adapts a Qwen3 written like those of jax-ml/bonsai and google/tunix.

    They share the names of their parts: `embedder`, `layers` of `input_layernorm`, `attn` (with
    `q_proj`, `k_proj`, `v_proj`, `o_proj`, `q_norm`, `k_norm`, which keep heads as an axis),
    `post_attention_layernorm` and `mlp`, then `final_norm` and `lm_head`, if there is one. The
    embedder has `encode` and `decode`, or is an `nnx.Embed`, of which the table is read as it is.

    Args:
      model: such a decoder.
      rope: rotary embedding; None for that of Qwen3, with theta 1,000,000, which is what both
        projects compute with, whatever `rope_theta` their configurations say.

    Returns:
      A decoder that `generate`, `prefill`, `score` and `stream` take.

    Raises:
      ConfigError: the model lacks one of these parts, or a part returns other shapes.

    Example:
      >>> import fluxion_jax as fx
      >>> from fluxion_jax.adapters import adapt_qwen3
      >>> from fluxion_jax.models import Decoder, ModelConfig
      >>> try:
      ...     adapt_qwen3(Decoder.random(ModelConfig.tiny_llama()))
      ... except fx.ConfigError as error:
      ...     print(str(error)[:42])
      expected a Qwen3 with the part `embedder`,
    """
    _check_parts(model, ("embedder", "layers", "final_norm"), "")
    decoder: Any = model
    for layer in decoder.layers[:1]:
        _check_parts(
            layer, ("input_layernorm", "attn", "post_attention_layernorm", "mlp"), "layers[0]."
        )
        _check_parts(
            layer.attn,
            ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"),
            "layers[0].attn.",
        )
    rotary = rope or Rope(1_000_000.0)

    def embed(model: Any, tokens: jax.Array, _: jax.Array) -> jax.Array:
        if hasattr(model.embedder, "encode"):
            return model.embedder.encode(tokens)  # type: ignore[no-any-return]
        return model.embedder.embedding[...][tokens]  # type: ignore[no-any-return]

    def qkv(layer: Any, x: jax.Array, positions: jax.Array) -> QKV:
        x, attn = layer.input_layernorm(x), layer.attn
        q, k = attn.q_norm(attn.q_proj(x)), attn.k_norm(attn.k_proj(x))
        return rotary.rotate(q, positions), rotary.rotate(k, positions), attn.v_proj(x)

    def finish(layer: Any, x: jax.Array, attended: jax.Array) -> jax.Array:
        x = x + layer.attn.o_proj(attended)
        return x + layer.mlp(layer.post_attention_layernorm(x))

    def logits(model: Any, x: jax.Array) -> jax.Array:
        x = model.final_norm(x)
        if hasattr(model, "lm_head"):
            return model.lm_head(x)  # type: ignore[no-any-return]
        return model.embedder.decode(x)  # type: ignore[no-any-return]

    return adapt(
        model,
        embed=embed,
        layers=lambda model: model.layers,
        qkv=qkv,
        finish=finish,
        logits=logits,
    )


def _check_parts(module: Any, names: Sequence[str], where: str) -> None:
    for name in names:
        if not hasattr(module, name):
            raise ConfigError(
                f"expected a Qwen3 with the part `{where}{name}`, got a "
                f"{type(module).__name__} without it; use `adapt`, and say what its parts are"
            )
