"""Translation of a Hugging Face `config.json` into a `ModelConfig`.

Every field that would change results and that the decoder does not implement is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fluxion_jax.errors import ConfigError, UnsupportedError
from fluxion_jax.models.config import ModelConfig
from fluxion_jax.rope import Rope

# What transformers assumes for a field that the file leaves out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_act": "silu", "rope_theta": 1e4, "tie_word_embeddings": False},
    "mistral": {"hidden_act": "silu", "rope_theta": 1e4, "tie_word_embeddings": False},
    "qwen2": {"hidden_act": "silu", "rope_theta": 1e4, "tie_word_embeddings": False},
    "qwen3": {
        "hidden_act": "silu",
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
        "head_dim": 128,
    },
    "gemma3_text": {
        "hidden_act": "gelu_pytorch_tanh",
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "tie_word_embeddings": True,
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131_072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
    },
}

# Fields that must be absent, null, false, 0 or, for a rotary fraction, 1.
_REFUSED = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_softcapping",
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "quantization_config",
    "mlp_bias",
    "use_bidirectional_attention",
    "attention_sinks",
    "is_encoder_decoder",
    "no_rope_layers",
)
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """See `ModelConfig.from_hf`."""
    architecture = config.get("model_type")
    if architecture == "gemma3" and "text_config" in config:
        # The vision tower is left out; the text decoder is the same as in text-only files.
        config = {**config["text_config"], "model_type": "gemma3_text"}
        architecture = "gemma3_text"
    if architecture not in _DEFAULTS:
        raise UnsupportedError(
            f"expected model_type to be one of {', '.join(_DEFAULTS)}, got {architecture!r}; "
            "put fluxion_jax.modules.Attention into your own model instead"
        )
    fields = {
        **_DEFAULTS[architecture],
        **{k: v for k, v in config.items() if v is not None},
    }
    _refuse_unsupported(architecture, fields)
    gemma = architecture == "gemma3_text"
    heads = _integer(fields, "num_attention_heads")
    d_model = _integer(fields, "hidden_size")
    head_dim = _integer(fields, "head_dim") if "head_dim" in fields else d_model // heads
    layers = _integer(fields, "num_hidden_layers")
    rope, sliding_rope = _ropes(fields, head_dim)
    window = _sliding_window(str(architecture), fields)
    bias = bool(fields.get("attention_bias", False))
    return ModelConfig(
        architecture="gemma3" if gemma else str(architecture),
        vocab_size=_integer(fields, "vocab_size"),
        d_model=d_model,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=int(fields.get("num_key_value_heads", heads)),
        head_dim=head_dim,
        d_ff=_integer(fields, "intermediate_size"),
        max_context_tokens=_integer(fields, "max_position_embeddings"),
        norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
        activation=_activation(fields),
        attention_scale=float(fields["query_pre_attn_scalar"]) ** -0.5 if gemma else None,
        rope=rope,
        sliding_rope=sliding_rope if gemma else None,
        sliding_window=window,
        sliding_layers=_sliding_layers(str(architecture), fields, layers) if window else (),
        tied_embeddings=bool(fields["tie_word_embeddings"]),
        qkv_bias=bias or architecture == "qwen2",
        out_bias=bias,
        qk_norm=gemma or architecture == "qwen3",
        post_norms=gemma,
        scale_embeddings=gemma,
    )


def _refuse_unsupported(architecture: str, fields: Mapping[str, Any]) -> None:
    refused = [name for name in _REFUSED if fields.get(name)]
    if fields.get("partial_rotary_factor", 1) != 1:
        refused.append("partial_rotary_factor")
    if architecture == "llama" and fields.get("use_sliding_window"):
        refused.append("use_sliding_window")
    known = {"full_attention"}
    if _sliding_window(architecture, fields):
        known.add("sliding_attention")
    if set(fields.get("layer_types", ())) - known:
        refused.append("layer_types")
    if refused:
        named = ", ".join(f"{name}={fields[name]!r}" for name in refused)
        raise UnsupportedError(
            f"expected a {architecture} model without {named}; this decoder does not implement "
            "that and would give wrong results, use another model"
        )


def _integer(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(
            f"expected {name} to be an integer in config.json, got {value!r}; the file is "
            "incomplete, download it again"
        )
    return value


def _activation(fields: Mapping[str, Any]) -> Any:
    name = fields.get("hidden_activation", fields["hidden_act"])
    if name not in _ACTIVATIONS:
        raise UnsupportedError(
            f"expected hidden_act to be one of {', '.join(_ACTIVATIONS)}, got {name!r}; "
            "use another model"
        )
    return _ACTIVATIONS[name]


def _sliding_window(architecture: str, fields: Mapping[str, Any]) -> int | None:
    """Tokens that sliding-window layers see, or None if the file asks for no such layers."""
    if architecture == "gemma3_text":
        return _integer(fields, "sliding_window")
    if architecture == "mistral" and "sliding_window" in fields:
        return _integer(fields, "sliding_window")
    if architecture in ("qwen2", "qwen3") and fields.get("use_sliding_window"):
        return _integer({"sliding_window": 4096, **fields}, "sliding_window")
    return None


def _sliding_layers(architecture: str, fields: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Which layers have the window, in a file that asks for one."""
    kinds = fields.get("layer_types")
    if kinds is None:
        if architecture == "mistral":
            return tuple(range(layers))
        if architecture in ("qwen2", "qwen3"):
            # The name means the opposite of what it says: the layers before it are full.
            return tuple(range(int(fields.get("max_window_layers", 28)), layers))
        pattern = int(fields.get("_sliding_window_pattern", fields["sliding_window_pattern"]))
        return tuple(i for i in range(layers) if (i + 1) % pattern)
    if len(kinds) != layers:
        raise ConfigError(
            f"expected layer_types of {layers} layers, got {len(kinds)}; "
            "num_hidden_layers and layer_types contradict each other"
        )
    return tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")


def _ropes(fields: Mapping[str, Any], head_dim: int) -> tuple[Rope, Rope]:
    """RoPE of global and of sliding-window layers, from the old and the new way of writing it."""
    parameters = fields.get("rope_parameters")
    theta = float(fields["rope_theta"])
    local_theta = float(fields.get("rope_local_base_freq", theta))
    if parameters is None:
        scaling = dict(fields.get("rope_scaling") or {})
        return _rope({"rope_theta": theta, **scaling}, head_dim), Rope(local_theta)
    if "full_attention" in parameters:
        return (
            _rope({"rope_theta": theta, **parameters["full_attention"]}, head_dim),
            _rope({"rope_theta": local_theta, **parameters.get("sliding_attention", {})}, head_dim),
        )
    return _rope({"rope_theta": theta, **parameters}, head_dim), Rope(local_theta)


def _rope(parameters: Mapping[str, Any], head_dim: int) -> Rope:
    theta = float(parameters["rope_theta"])
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if parameters.get("partial_rotary_factor", 1) != 1:
        raise UnsupportedError(
            "expected partial_rotary_factor 1, got "
            f"{parameters['partial_rotary_factor']}; use another model"
        )
    try:
        if kind == "default":
            return Rope(theta)
        if kind == "linear":
            return Rope.linear(theta, parameters["factor"])
        if kind == "llama3":
            return Rope.llama3(
                theta,
                head_dim,
                factor=parameters["factor"],
                low_freq_factor=parameters["low_freq_factor"],
                high_freq_factor=parameters["high_freq_factor"],
                original_context_tokens=parameters["original_max_position_embeddings"],
            )
    except KeyError as error:
        raise ConfigError(
            f"expected {error.args[0]} in the {kind} rope_scaling of config.json, got none; the "
            "file is incomplete, download it again"
        ) from error
    raise UnsupportedError(
        f"expected rope_type default, linear or llama3, got {kind!r}; use another model"
    )
