"""The shape and the switches of a decoder-only model, independent of the file they came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from fluxion_jax.errors import ConfigError
from fluxion_jax.rope import Rope

if TYPE_CHECKING:
    from fluxion_jax.cache.layout import KVLayout

Activation = Literal["silu", "gelu_tanh"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama-family or Gemma 3 text decoder.

    Attributes:
      architecture: what the file called it: "llama", "mistral", "qwen2", "qwen3" or "gemma3".
      vocab_size: rows of the embedding table.
      d_model: model width D.
      num_layers: decoder layers L.
      num_heads: query heads N of a layer.
      num_kv_heads: KV heads K of a layer, a divisor of N.
      head_dim: head size H.
      d_ff: width of the gated feed-forward layer.
      max_context_tokens: longest sequence the model was trained for.
      norm_eps: epsilon of every RMS-norm.
      activation: of the feed-forward gate.
      attention_scale: factor of the attention scores; None means `H ** -0.5`.
      rope: rotary embedding of layers that attend to everything.
      sliding_rope: rotary embedding of sliding-window layers; None means `rope`.
      sliding_window: tokens a query of a sliding-window layer sees, itself included.
      sliding_layers: indices of the sliding-window layers.
      tied_embeddings: whether the output layer is the embedding table.
      qkv_bias: biases on the query, key and value projections.
      out_bias: bias on the attention's output projection.
      qk_norm: per-head RMS-norm of queries and keys.
      post_norms: RMS-norms also behind attention and feed-forward, before the residual sum.
      scale_embeddings: embeddings times `sqrt(D)`, rounded to the parameters' dtype first.

    Raises:
      ConfigError: for sizes that do not fit together.
    """

    architecture: str
    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    max_context_tokens: int
    norm_eps: float = 1e-6
    activation: Activation = "silu"
    attention_scale: float | None = None
    rope: Rope = dataclasses.field(default_factory=Rope)
    sliding_rope: Rope | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()
    tied_embeddings: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    scale_embeddings: bool = False

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "d_model",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "d_ff",
            "max_context_tokens",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(
                    f"expected {name} to be an integer of at least 1, got {value!r}; "
                    "check the model's configuration"
                )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                "expected num_heads to be a multiple of num_kv_heads, got "
                f"{self.num_heads} and {self.num_kv_heads}; check the model's configuration"
            )
        if self.activation not in ("silu", "gelu_tanh"):
            raise ConfigError(
                f"expected activation 'silu' or 'gelu_tanh', got {self.activation!r}; choose one"
            )
        if self.norm_eps <= 0:
            raise ConfigError(
                f"expected norm_eps above 0, got {self.norm_eps}; usual values are 1e-5 and 1e-6"
            )
        if self.sliding_layers and (self.sliding_window is None or self.sliding_window < 1):
            raise ConfigError(
                f"expected sliding_window of at least 1 token for sliding layers "
                f"{self.sliding_layers}, got {self.sliding_window}; set it or drop the layers"
            )
        outside = [i for i in self.sliding_layers if not 0 <= i < self.num_layers]
        if outside:
            raise ConfigError(
                f"expected sliding_layers in [0, {self.num_layers}), got {outside}; remove them"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Reads the content of a Hugging Face `config.json`.

        Raises:
          UnsupportedError: for an architecture or a feature outside the Llama family and Gemma 3.
          ConfigError: for missing or contradicting values.
        """
        from fluxion_jax.models.config_hf import from_hf

        return from_hf(config)

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        *,
        tied_embeddings: bool,
        qkv_bias: bool = False,
        out_bias: bool = False,
        rope_divisors: tuple[float, ...] = (),
    ) -> ModelConfig:
        """Reads the metadata of a GGUF file.

        Args:
          metadata: key-value pairs of the file.
          tied_embeddings: whether the file lacks `output.weight`; GGUF says so only that way.
          qkv_bias: whether the file has biases of queries, keys and values.
          out_bias: whether the file has biases of the attention's output.
          rope_divisors: content of `rope_freqs.weight`, empty if there is none.

        Raises:
          UnsupportedError: for an architecture or a feature outside the Llama family and Gemma 3.
          ConfigError: for missing or contradicting values.
        """
        from fluxion_jax.models.config_gguf import from_gguf

        return from_gguf(
            metadata,
            tied_embeddings=tied_embeddings,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            rope_divisors=rope_divisors,
        )

    @classmethod
    def tiny_llama(cls) -> ModelConfig:
        """Two layers of six query and two KV heads: for tests and examples with random weights."""
        return cls(
            architecture="llama",
            vocab_size=256,
            d_model=48,
            num_layers=2,
            num_heads=6,
            num_kv_heads=2,
            head_dim=64,
            d_ff=96,
            max_context_tokens=8192,
            norm_eps=1e-5,
        )

    @classmethod
    def tiny_gemma3(cls) -> ModelConfig:
        """Four layers, one in two with a sliding window: for tests with random weights."""
        return cls(
            architecture="gemma3",
            vocab_size=256,
            d_model=48,
            num_layers=4,
            num_heads=6,
            num_kv_heads=2,
            head_dim=64,
            d_ff=96,
            max_context_tokens=8192,
            activation="gelu_tanh",
            rope=Rope(1_000_000.0),
            sliding_rope=Rope(10_000.0),
            sliding_window=32,
            sliding_layers=(0, 2),
            qk_norm=True,
            post_norms=True,
            scale_embeddings=True,
        )

    def kv_layout(
        self,
        dtype: str = "bfloat16",
        summaries: Literal["host", "device"] = "host",
        *,
        sketch: bool = False,
    ) -> KVLayout:
        """The layout of a KV cache for this model.

        Args:
          dtype: dtype of cached keys and values; bfloat16 halves what attention must read.
          summaries: where block summaries live.
          sketch: keep a sketch of the host cache for policies that look at it, such as `fluxion`.
        """
        from fluxion_jax.cache.layout import KVLayout

        return KVLayout(
            self.num_layers,
            self.num_kv_heads,
            self.head_dim,
            dtype=dtype,
            summaries=summaries,
            sliding_window=self.sliding_window if self.sliding_layers else None,
            sliding_layers=self.sliding_layers,
            num_heads=self.num_heads,
            sketch=sketch,
        )
