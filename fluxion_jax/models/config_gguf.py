"""Translation of the metadata of a GGUF file into a `ModelConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fluxion_jax.errors import ConfigError, UnsupportedError
from fluxion_jax.models.config import ModelConfig
from fluxion_jax.rope import Rope

GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")

# Keys that must be absent or 0, without the architecture in front.
_REFUSED = (
    "expert_count",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "attention.sinks",
)
# Gemma 3 27B scales queries by its model width per head; the files do not say so
# (llama.cpp tells it by its number of layers, too).
_GEMMA3_27B_LAYERS = 62


def from_gguf(
    metadata: Mapping[str, Any],
    *,
    tied_embeddings: bool,
    qkv_bias: bool,
    out_bias: bool,
    rope_divisors: tuple[float, ...],
) -> ModelConfig:
    """See `ModelConfig.from_gguf`."""
    architecture = metadata.get("general.architecture")
    if architecture not in GGUF_ARCHITECTURES:
        raise UnsupportedError(
            f"expected general.architecture to be one of {', '.join(GGUF_ARCHITECTURES)}, got "
            f"{architecture!r}; put fluxion_jax.modules.Attention into your own model instead"
        )
    prefix = f"{architecture}."
    fields = {k[len(prefix) :]: v for k, v in metadata.items() if k.startswith(prefix)}
    gemma = architecture == "gemma3"
    refused = [name for name in _REFUSED if fields.get(name)]
    if not gemma and fields.get("attention.sliding_window"):
        refused.append("attention.sliding_window")
    if refused:
        named = ", ".join(f"{prefix}{name}={fields[name]!r}" for name in refused)
        raise UnsupportedError(
            f"expected a {architecture} model without {named}; this decoder does not implement "
            "that and would give wrong results, use another model"
        )
    heads = _integer(fields, prefix, "attention.head_count")
    d_model = _integer(fields, prefix, "embedding_length")
    layers = _integer(fields, prefix, "block_count")
    head_dim = int(fields.get("attention.key_length", d_model // heads))
    for name in ("attention.value_length", "rope.dimension_count"):
        if fields.get(name, head_dim) != head_dim:
            raise UnsupportedError(
                f"expected {prefix}{name} to be the head size {head_dim}, got {fields[name]}; "
                "use another model"
            )
    vocab_size = fields.get("vocab_size", len(metadata.get("tokenizer.ggml.tokens", ())))
    scale = None
    if gemma:
        scale = (d_model / heads if layers == _GEMMA3_27B_LAYERS else head_dim) ** -0.5
    window = _integer(fields, prefix, "attention.sliding_window") if gemma else None
    return ModelConfig(
        architecture=str(architecture),
        vocab_size=int(vocab_size),
        d_model=d_model,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=int(fields.get("attention.head_count_kv", heads)),
        head_dim=head_dim,
        d_ff=_integer(fields, prefix, "feed_forward_length"),
        max_context_tokens=_integer(fields, prefix, "context_length"),
        norm_eps=_decimal(fields.get("attention.layer_norm_rms_epsilon", 1e-6)),
        activation="gelu_tanh" if gemma else "silu",
        attention_scale=scale,
        rope=_rope(fields, prefix, 1e6 if gemma else 1e4, rope_divisors),
        sliding_rope=Rope(_decimal(fields.get("rope.freq_base_swa", 1e4))) if gemma else None,
        sliding_window=window,
        sliding_layers=_sliding_layers(fields, layers) if gemma else (),
        tied_embeddings=tied_embeddings,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        qk_norm=gemma or architecture == "qwen3",
        post_norms=gemma,
        scale_embeddings=gemma,
    )


def _decimal(value: float) -> float:
    """The shortest decimal of a float32, so that 9.9999997e-06 reads 1e-05."""
    return float(str(np.float32(value)))


def _integer(fields: Mapping[str, Any], prefix: str, name: str) -> int:
    value = fields.get(name)
    if not isinstance(value, int):
        raise ConfigError(
            f"expected {prefix}{name} to be an integer, got {value!r}; the file is incomplete or "
            "its layers differ in size, use another one"
        )
    return value


def _sliding_layers(fields: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    pattern = fields.get("attention.sliding_window_pattern", 6)
    if isinstance(pattern, int):
        return tuple(i for i in range(layers) if (i + 1) % pattern)
    return tuple(i for i, sliding in enumerate(pattern) if sliding)


def _rope(
    fields: Mapping[str, Any], prefix: str, theta: float, divisors: tuple[float, ...]
) -> Rope:
    theta = _decimal(fields.get("rope.freq_base", theta))
    kind = fields.get("rope.scaling.type", "none")
    if kind == "none":
        return Rope(theta, divisors)
    if kind == "linear" and not divisors:
        return Rope.linear(theta, _decimal(fields["rope.scaling.factor"]))
    raise UnsupportedError(
        f"expected {prefix}rope.scaling.type none or linear, got {kind!r}; use another model"
    )
