"""Which tensor of a file becomes which parameter of the decoder, and the filling in.

One table serves both file formats; a loader only has to read a tensor by name.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fluxion_jax.errors import IntegrityError, UnsupportedError
from fluxion_jax.models.config import ModelConfig
from fluxion_jax.models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of the decoder and its names elsewhere.

    Attributes:
      path: where it sits in the NNX state.
      hf: name in Hugging Face checkpoints.
      gguf: name in GGUF files.
      kind: a matrix is stored `[out, in]` in files and `[in, out]` in the decoder.
      heads: heads whose channels llama.cpp interleaves in its "llama" files, 0 for none.
    """

    path: tuple[str | int, ...]
    hf: str
    gguf: str
    kind: Literal["matrix", "bias", "table", "norm"]
    heads: int = 0


def parameters(config: ModelConfig) -> Iterator[Parameter]:
    """All parameters of a decoder of this configuration."""
    yield Parameter(("embedding",), "model.embed_tokens.weight", "token_embd.weight", "table")
    yield Parameter(("norm", "scale"), "model.norm.weight", "output_norm.weight", "norm")
    if not config.tied_embeddings:
        yield Parameter(("output",), "lm_head.weight", "output.weight", "table")
    for index in range(config.num_layers):
        for path, hf, gguf, kind, heads in _layer(config):
            yield Parameter(
                ("layers", index, *path),
                f"model.layers.{index}.{hf}",
                f"blk.{index}.{gguf}",
                kind,
                heads,
            )


_Row = tuple[tuple[str, ...], str, str, Literal["matrix", "bias", "table", "norm"], int]


def _layer(config: ModelConfig) -> Iterator[_Row]:
    heads = {"q": config.num_heads, "k": config.num_kv_heads}
    for name, gguf in (("q", "attn_q"), ("k", "attn_k"), ("v", "attn_v"), ("o", "attn_output")):
        here, hf = ("attention", name), f"self_attn.{name}_proj"
        yield (*here, "kernel"), f"{hf}.weight", f"{gguf}.weight", "matrix", heads.get(name, 0)
        if config.out_bias if name == "o" else config.qkv_bias:
            yield (*here, "bias"), f"{hf}.bias", f"{gguf}.bias", "bias", heads.get(name, 0)
        if config.qk_norm and name in heads:
            path = ("attention", f"{name}_norm", "scale")
            yield path, f"self_attn.{name}_norm.weight", f"{gguf}_norm.weight", "norm", 0
    for name, gguf in (("gate", "ffn_gate"), ("up", "ffn_up"), ("down", "ffn_down")):
        path = ("feed_forward", name, "kernel")
        yield path, f"mlp.{name}_proj.weight", f"{gguf}.weight", "matrix", 0
    norms = [("attention_norm", "input_layernorm", "attn_norm")]
    if config.post_norms:
        norms += [
            ("attention_post_norm", "post_attention_layernorm", "post_attention_norm"),
            ("feed_forward_norm", "pre_feedforward_layernorm", "ffn_norm"),
            ("feed_forward_post_norm", "post_feedforward_layernorm", "post_ffw_norm"),
        ]
    else:
        norms.append(("feed_forward_norm", "post_attention_layernorm", "ffn_norm"))
    for name, hf, gguf in norms:
        yield (name, "scale"), f"{hf}.weight", f"{gguf}.weight", "norm", 0


def build(
    config: ModelConfig,
    read: Callable[[Parameter], np.ndarray],
    name_of: Callable[[Parameter], str],
    *,
    dtype: Any,
    source: str,
) -> Decoder:
    """Creates a decoder from the tensors of a file, one at a time.

    Args:
      config: the model's configuration.
      read: returns a parameter's tensor as it lies in the file.
      name_of: the name of a parameter in this kind of file.
      dtype: dtype of parameters and activations; norm scales are always float32.
      source: the file, for messages.

    Raises:
      IntegrityError: a tensor has another shape than the configuration implies.
    """
    skeleton = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype))
    graph, state = nnx.split(skeleton)
    slots = dict(nnx.to_flat_state(state))
    filled = []
    for parameter in parameters(config):
        slot = slots.pop(parameter.path)
        tensor = read(parameter)
        abstract = slot.get_value()
        wanted = abstract.shape[::-1] if parameter.kind == "matrix" else abstract.shape
        if tensor.shape != wanted:
            raise IntegrityError(
                f"expected tensor {name_of(parameter)} of {source} to have shape {wanted}, got "
                f"{tensor.shape}; its configuration and its weights do not belong together"
            )
        if parameter.kind == "matrix":
            tensor = tensor.T
        # A copy always: JAX on the CPU would otherwise go on reading the mapped file.
        filled.append((parameter.path, slot.replace(jnp.array(tensor, abstract.dtype))))
    # Parameters only: a decoder has no other state.
    assert not slots, slots
    return nnx.merge(graph, nnx.from_flat_state(filled))


def check_names(
    expected: Iterable[str], present: Iterable[str], *, source: str, ignored: Iterable[str] = ()
) -> None:
    """Checks that a file has exactly the tensors the decoder reads.

    Args:
      expected: names the decoder reads.
      present: names in the file.
      source: the file, for messages.
      ignored: names that may be there unread.

    Raises:
      IntegrityError: tensors are missing.
      UnsupportedError: tensors are there that the decoder would not use.
    """
    wanted, there = list(expected), set(present)
    missing = [name for name in wanted if name not in there]
    extra = sorted(there - set(wanted) - set(ignored))
    if missing:
        close = difflib.get_close_matches(missing[0], extra, n=1)
        hint = f" (it has {close[0]})" if close else ""
        raise IntegrityError(
            f"expected {len(wanted)} tensors in {source}, got none named {_some(missing)}{hint}; "
            "the file is incomplete or of another architecture, download it again"
        )
    if extra:
        raise UnsupportedError(
            f"expected no tensors in {source} besides those of the decoder, got {_some(extra)}; "
            "they belong to a feature this decoder does not implement, use another model"
        )


def _some(names: list[str], limit: int = 4) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
