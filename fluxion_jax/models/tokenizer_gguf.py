"""Rebuilding a tokenizer from the metadata of a GGUF file.

GGUF stores two kinds: byte-level BPE with explicit merges ("gpt2"), and SentencePiece ("llama"),
whose merges follow from the scores of its pieces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fluxion_jax.errors import IntegrityError, UnsupportedError
from fluxion_jax.models.extras import import_extra
from fluxion_jax.models.tokenizer import Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_SPACE = "▁"

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS = ("gpt-2", "smollm", "llama-bpe", "qwen2")


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Builds the tokenizer described by `tokenizer.ggml.*`.

    Raises:
      IntegrityError: the file has no tokenizer or an incomplete one.
      UnsupportedError: a kind of tokenizer or pre-tokenizer that is not known here.
    """
    fields = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    model = fields.get("model")
    if model not in ("gpt2", "llama"):
        raise UnsupportedError(
            f"expected tokenizer.ggml.model 'gpt2' or 'llama', got {model!r}; use a model with "
            "one of these tokenizers"
        )
    needed = ("tokens", "token_type", "merges" if model == "gpt2" else "scores")
    missing = [name for name in needed if name not in fields]
    if missing:
        raise IntegrityError(
            f"expected tokenizer.ggml.{missing[0]} in a file with a {model} tokenizer, got none; "
            "convert the model again"
        )
    backend = _byte_level(fields) if model == "gpt2" else _sentencepiece(fields)
    _add_tokens(backend, fields["tokens"], fields["token_type"])
    bos_id = fields.get("bos_token_id")
    add_bos = bool(fields.get("add_bos_token", model == "llama")) and bos_id is not None
    return Tokenizer(
        backend,
        bos_id=bos_id,
        eos_ids=[fields[k] for k in ("eos_token_id", "eot_token_id") if k in fields],
        add_bos=add_bos,
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def _byte_level(fields: Mapping[str, Any]) -> Any:
    tokenizers = import_extra("tokenizers")
    split = fields.get("pre")
    if split not in _SPLITS:
        raise UnsupportedError(
            f"expected tokenizer.ggml.pre to be one of {', '.join(_SPLITS)}, got {split!r}; "
            "load the model from Hugging Face files, which describe the pre-tokenizer"
        )
    pre, regex = tokenizers.pre_tokenizers, tokenizers.Regex
    model = tokenizers.models.BPE(
        vocab={token: index for index, token in enumerate(fields["tokens"])},
        merges=[tuple(merge.split(" ")) for merge in fields["merges"]],
        ignore_merges=split == "llama-bpe",
    )
    backend = tokenizers.Tokenizer(model)
    backend.decoder = tokenizers.decoders.ByteLevel()
    plain = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre.ByteLevel(add_prefix_space=False, use_regex=True)
    if split == "gpt-2":
        backend.pre_tokenizer = gpt2
    elif split == "smollm":
        backend.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), gpt2])
    elif split == "llama-bpe":
        backend.pre_tokenizer = pre.Sequence([pre.Split(regex(_LLAMA3_SPLIT), "isolated"), plain])
    else:
        backend.normalizer = tokenizers.normalizers.NFC()
        backend.pre_tokenizer = pre.Sequence([pre.Split(regex(_QWEN2_SPLIT), "isolated"), plain])
    return backend


def _sentencepiece(fields: Mapping[str, Any]) -> Any:
    tokenizers = import_extra("tokenizers")
    tokens, kinds = fields["tokens"], fields["token_type"]
    unknown = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _UNKNOWN]
    if "unknown_token_id" in fields:
        unknown = [tokens[fields["unknown_token_id"]]]
    model = tokenizers.models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=_merges_by_score(tokens, kinds, fields["scores"]),
        unk_token=unknown[0] if unknown else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    replace = tokenizers.normalizers.Replace(" ", _SPACE)
    steps = [
        tokenizers.decoders.Replace(_SPACE, " "),
        tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse(),
    ]
    if fields.get("add_space_prefix", True):
        prepend = tokenizers.normalizers.Prepend(_SPACE)
        backend.normalizer = tokenizers.normalizers.Sequence([prepend, replace])
        steps.append(tokenizers.decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = replace
    backend.decoder = tokenizers.decoders.Sequence(steps)
    return backend


def _merges_by_score(
    tokens: Sequence[str], kinds: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best score of the third first.

    SentencePiece joins the pair of neighbours whose join has the best score; BPE with merges
    ranked by that score does the same.
    """
    pieces = {
        token: score
        for token, kind, score in zip(tokens, kinds, scores, strict=True)
        if kind == _NORMAL
    }
    ranked = sorted(pieces, key=lambda piece: -pieces[piece])
    return [
        (piece[:cut], piece[cut:])
        for piece in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]


def _add_tokens(backend: Any, tokens: Sequence[str], kinds: Sequence[int]) -> None:
    """Registers the tokens that text is searched for before anything else."""
    added = import_extra("tokenizers").AddedToken
    wanted: dict[int, list[Any]] = {_CONTROL: [], _USER_DEFINED: []}
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in wanted:
            wanted[kind].append(added(token, normalized=False, special=kind == _CONTROL))
    backend.add_special_tokens(wanted[_CONTROL])
    backend.add_tokens(wanted[_USER_DEFINED])
