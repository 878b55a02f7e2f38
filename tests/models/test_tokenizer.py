from __future__ import annotations

from typing import Any

import pytest
import tokenizers

from fluxion_jax.errors import ConfigError, UnsupportedError
from fluxion_jax.models.tokenizer import Tokenizer
from fluxion_jax.models.tokenizer_gguf import tokenizer_from_gguf

SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are terse.<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role']}}"
)


def make(chat_template: str | None = None, **changes: Any) -> Tokenizer:
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, [])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    settings: dict[str, Any] = {"bos_id": 256, "eos_ids": [7], "add_bos": False} | changes
    return Tokenizer(backend, chat_template=chat_template, **settings)


def read(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special=False)


def test_text_comes_back() -> None:
    tokenizer = make()
    text = "naïve 日本 \x00 <|im_end|> 😀"
    assert read(tokenizer, tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("<|im_end|>", "")
    assert tokenizer.decode(tokenizer.encode("😀")[:2]) == "\ufffd"
    assert tokenizer.vocab_size == 256 + len(SPECIAL)


def test_the_ends_of_turns_end_a_generation() -> None:
    assert make().eos_ids == (7, 258, 260)
    assert make().special_ids == frozenset(range(256, 261))


def test_the_start_token() -> None:
    assert make(add_bos=True).encode("a")[0] == 256
    assert make(add_bos=True).encode("a", add_bos=False) == make().encode("a")
    assert make().encode("a", add_bos=True) == make(add_bos=True).encode("a")
    with pytest.raises(ConfigError, match="expected a tokenizer with a start token"):
        make(bos_id=None).encode("a", add_bos=True)


def test_chatml_with_the_system_message_of_the_template() -> None:
    tokenizer = make(CHATML)
    user = {"role": "user", "content": "Hi"}
    asked = "<|im_start|>user\nHi<|im_end|>\n"
    opened = "<|im_start|>assistant\n"
    default = "<|im_start|>system\nYou are terse.<|im_end|>\n"
    assert read(tokenizer, tokenizer.chat([user])) == default + asked + opened
    system = {"role": "system", "content": "Rhyme."}
    given = "<|im_start|>system\nRhyme.<|im_end|>\n"
    assert read(tokenizer, tokenizer.chat([system, user])) == given + asked + opened
    answer = {"role": "assistant", "content": "Yo"}
    turns = default + asked + "<|im_start|>assistant\nYo<|im_end|>\n" + asked + opened
    assert read(tokenizer, tokenizer.chat([user, answer, user])) == turns
    plain = make("{{ '<|im_start|>' + message['role'] + '\n' }}")
    assert read(plain, plain.chat([user])) == asked + opened


def test_gemma_puts_the_system_message_into_the_first_turn() -> None:
    tokenizer = make("{{ '<start_of_turn>' + role }}")
    messages = [
        {"role": "system", "content": "Rhyme."},
        {"role": "user", "content": " Hi\n"},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "Bye"},
    ]
    assert read(tokenizer, tokenizer.chat(messages)) == (
        "<s><start_of_turn>user\nRhyme.\n\nHi<end_of_turn>\n<start_of_turn>model\nYo<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
    )


def test_other_chat_formats_are_refused() -> None:
    message = [{"role": "user", "content": "Hi"}]
    with pytest.raises(UnsupportedError, match="got another template; write the prompt yourself"):
        make("[INST] {{ content }} [/INST]").chat(message)
    with pytest.raises(UnsupportedError, match="got no template"):
        make().chat(message)


@pytest.mark.parametrize("roles", [[], ["tool"], ["user", "system"]])
def test_roles_out_of_place(roles: list[str]) -> None:
    with pytest.raises(ConfigError, match="expected messages with the roles user and assistant"):
        make(CHATML).chat([{"role": role, "content": "Hi"} for role in roles])


def gpt2_metadata(pre: str, merges: list[str]) -> dict[str, Any]:
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(merge.replace(" ", "") for merge in merges)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(tokens),
        "tokenizer.ggml.merges": merges,
    }


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["1234", " ", " ab", "\n\n"]),
        ("smollm", ["1", "2", "3", "4", " ", " ab", "\n\n"]),
        ("llama-bpe", ["123", "4", " ", " ab", "\n\n"]),
        ("qwen2", ["1", "2", "3", "4", " ", " ab", "\n\n"]),
    ],
)
def test_pre_tokenizers(pre: str, pieces: list[str]) -> None:
    """Everything that may merge does, so that the pieces show where the pre-tokenizer cuts."""
    merges = ["1 2", "12 3", "123 4", "4 Ġ", "Ġ a", "Ġa b", "Ċ Ċ"]
    tokenizer = tokenizer_from_gguf(gpt2_metadata(pre, merges))
    ids = tokenizer.encode("1234  ab\n\n")
    assert [tokenizer.decode([i]) for i in ids] == pieces


def sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    """Pieces whose best-scored joins differ from the leftmost ones."""
    pieces = {"a": -9.0, "b": -9.0, "c": -9.0, "▁": -9.0, "ab": -2.0, "bc": -1.0, "▁a": -3.0}
    tokens = ["<unk>", "<s>", "</s>", "\n\n", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 260 + list(pieces.values()),
        "tokenizer.ggml.token_type": [2, 3, 3, 4] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": False,
    } | changes


def test_sentencepiece_joins_by_score_and_falls_back_to_bytes() -> None:
    metadata = sentencepiece_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    tokenizer = tokenizer_from_gguf(metadata)

    def pieces(text: str) -> list[str]:
        return [tokens[i] for i in tokenizer.encode(text)]

    assert pieces("abc") == ["<s>", "a", "bc"]
    assert pieces("ab a") == ["<s>", "ab", "▁a"]
    assert pieces("a\n\nb\n") == ["<s>", "a", "\n\n", "b", "<0x0A>"]
    assert pieces("é") == ["<s>", "<0xC3>", "<0xA9>"]
    for text in ("abc a", "a\n\nb\n", "é日", " a "):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_with_a_space_in_front() -> None:
    metadata = sentencepiece_metadata(**{"tokenizer.ggml.add_space_prefix": True})
    tokenizer = tokenizer_from_gguf(metadata)
    ids = tokenizer.encode("abc")
    assert [metadata["tokenizer.ggml.tokens"][i] for i in ids] == ["<s>", "▁a", "bc"]
    assert tokenizer.decode(ids) == "abc"
