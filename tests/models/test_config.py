from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import pytest

from fluxion_jax.errors import ConfigError, UnsupportedError
from fluxion_jax.models.config import ModelConfig
from fluxion_jax.rope import Rope
from tests.goldens import load as goldens

LLAMA_31 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
GEMMA3_4B = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152},
}
GEMMA3_GGUF = {
    "general.architecture": "gemma3",
    "gemma3.context_length": 32768,
    "gemma3.embedding_length": 640,
    "gemma3.block_count": 18,
    "gemma3.feed_forward_length": 2048,
    "gemma3.attention.head_count": 4,
    "gemma3.attention.head_count_kv": 1,
    "gemma3.attention.layer_norm_rms_epsilon": 9.999999974752427e-07,
    "gemma3.attention.key_length": 256,
    "gemma3.attention.value_length": 256,
    "gemma3.attention.sliding_window": 512,
    "gemma3.rope.freq_base": 1000000.0,
    "gemma3.vocab_size": 262144,
}


def test_llama_with_scaled_rope() -> None:
    config = ModelConfig.from_hf(LLAMA_31)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (32, 8, 128)
    assert not config.tied_embeddings
    assert config.rope == Rope.llama3(
        500000.0,
        128,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_context_tokens=8192,
    )
    assert config.sliding_layers == ()


def test_gemma_with_what_its_file_leaves_out() -> None:
    config = ModelConfig.from_hf(GEMMA3_4B)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
    assert config.rope == Rope.linear(1e6, 8.0)
    assert config.sliding_rope == Rope(1e4)
    assert config.sliding_window == 1024
    assert [i for i in range(34) if i not in config.sliding_layers] == [5, 11, 17, 23, 29]
    assert config.attention_scale == 256**-0.5
    assert config.tied_embeddings


def test_both_ways_of_writing_rope_mean_the_same() -> None:
    old = ModelConfig.from_hf(GEMMA3_4B)
    text = {k: v for k, v in GEMMA3_4B["text_config"].items() if k != "rope_scaling"}
    text["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert ModelConfig.from_hf(text) == old


def test_qwen_differences() -> None:
    qwen2 = ModelConfig.from_hf(LLAMA_31 | {"model_type": "qwen2", "rope_scaling": None})
    assert (qwen2.qkv_bias, qwen2.out_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = ModelConfig.from_hf(LLAMA_31 | {"model_type": "qwen3", "rope_scaling": None})
    assert (qwen3.qkv_bias, qwen3.out_bias, qwen3.qk_norm) == (False, False, True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gpt_oss"}, "got 'gpt_oss'"),
        ({"model_type": None}, "got None"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ({"num_local_experts": 8}, "num_local_experts=8"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"layer_types": ["sliding_attention"] * 32}, "layer_types"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 32}, "layer_types"),
        ({"model_type": "mistral", "layer_types": ["chunked_attention"] * 32}, "layer_types"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "got 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "got 'dynamic'"),
        ({"hidden_act": "relu2"}, "got 'relu2'"),
    ],
)
def test_what_would_change_results_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedError) as error:
        ModelConfig.from_hf(LLAMA_31 | change)
    assert named in str(error.value)


def test_mistral_without_a_window_is_a_llama() -> None:
    config = ModelConfig.from_hf(
        LLAMA_31 | {"model_type": "mistral", "sliding_window": None, "rope_scaling": None}
    )
    expected = ModelConfig.from_hf(LLAMA_31 | {"rope_scaling": None})
    assert dataclasses.replace(config, architecture="llama") == expected


@pytest.mark.parametrize(
    ("change", "window", "layers"),
    [
        ({"model_type": "mistral", "sliding_window": 4096}, 4096, range(32)),
        ({"model_type": "mistral", "sliding_window": None}, None, ()),
        ({"model_type": "qwen2", "sliding_window": 4096}, None, ()),
        ({"model_type": "qwen2", "use_sliding_window": True}, 4096, range(28, 32)),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 512}
            | {"max_window_layers": 30},
            512,
            (30, 31),
        ),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 512}
            | {"layer_types": ["sliding_attention", "full_attention"] * 16},
            512,
            range(0, 32, 2),
        ),
    ],
)
def test_layers_with_a_window(
    change: dict[str, Any], window: int | None, layers: Sequence[int]
) -> None:
    config = ModelConfig.from_hf(LLAMA_31 | {"rope_scaling": None} | change)
    assert config.sliding_window == window
    assert config.sliding_layers == tuple(layers)


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "max_position_embeddings"])
def test_a_missing_field_is_named(name: str) -> None:
    config = {key: value for key, value in LLAMA_31.items() if key != name}
    with pytest.raises(ConfigError, match=f"expected {name} to be an integer"):
        ModelConfig.from_hf(config)


def test_an_incomplete_rope_scaling_is_named() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0}
    with pytest.raises(ConfigError, match="expected low_freq_factor in the llama3 rope_scaling"):
        ModelConfig.from_hf(LLAMA_31 | {"rope_scaling": scaling})


def test_gguf_of_gemma() -> None:
    config = ModelConfig.from_gguf(GEMMA3_GGUF, tied_embeddings=True)
    assert config.norm_eps == 1e-6
    assert config.rope == Rope(1e6)
    assert config.sliding_rope == Rope(1e4)
    assert [i for i in range(18) if i not in config.sliding_layers] == [5, 11, 17]
    assert config.attention_scale == 256**-0.5
    pattern = {"gemma3.attention.sliding_window_pattern": [True, False] * 9}
    config = ModelConfig.from_gguf(GEMMA3_GGUF | pattern, tied_embeddings=True)
    assert config.sliding_layers == tuple(range(0, 18, 2))


def test_gguf_of_the_27b_gemma_has_its_own_scale() -> None:
    big = {
        "gemma3.block_count": 62,
        "gemma3.embedding_length": 5376,
        "gemma3.attention.head_count": 32,
        "gemma3.attention.head_count_kv": 16,
        "gemma3.attention.key_length": 128,
        "gemma3.attention.value_length": 128,
    }
    config = ModelConfig.from_gguf(GEMMA3_GGUF | big, tied_embeddings=True)
    assert config.attention_scale == 168**-0.5


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"general.architecture": "mamba"}, "got 'mamba'"),
        ({"gemma3.expert_count": 8}, "gemma3.expert_count=8"),
        ({"gemma3.final_logit_softcapping": 30.0}, "gemma3.final_logit_softcapping=30.0"),
        ({"gemma3.rope.scaling.type": "yarn"}, "got 'yarn'"),
        ({"gemma3.rope.dimension_count": 64}, "rope.dimension_count to be the head size 256"),
    ],
)
def test_gguf_features_are_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedError) as error:
        ModelConfig.from_gguf(GEMMA3_GGUF | change, tied_embeddings=True)
    assert named in str(error.value)


def test_gguf_layers_of_different_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected gemma3\.feed_forward_length to be an integer"):
        ModelConfig.from_gguf(
            GEMMA3_GGUF | {"gemma3.feed_forward_length": [2048, 1024]}, tied_embeddings=True
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "expected num_heads to be a multiple of num_kv_heads, got 5 and 2"),
        ({"vocab_size": 0}, "expected vocab_size to be an integer of at least 1, got 0"),
        ({"norm_eps": 0.0}, "expected norm_eps above 0"),
        ({"activation": "relu"}, "expected activation 'silu' or 'gelu_tanh', got 'relu'"),
        ({"sliding_layers": (1,)}, "expected sliding_window of at least 1 token"),
        ({"sliding_layers": (9,), "sliding_window": 4}, r"sliding_layers in \[0, 2\), got \[9\]"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(ModelConfig.tiny_llama(), **change)


def test_layout_of_a_cache() -> None:
    layout = ModelConfig.tiny_gemma3().kv_layout("float32", summaries="device")
    assert (layout.num_layers, layout.num_kv_heads, layout.head_dim) == (4, 2, 64)
    assert (layout.dtype, layout.summaries) == ("float32", "device")
    assert (layout.sliding_window, layout.sliding_layers) == (32, (0, 2))
    assert ModelConfig.tiny_llama().kv_layout().sliding_window is None


@pytest.mark.parametrize("name", goldens.TINY)
def test_configurations_written_by_transformers(name: str) -> None:
    config = json.loads((goldens.HERE / name / "config.json").read_text())
    assert ModelConfig.from_hf(config).vocab_size == 64
