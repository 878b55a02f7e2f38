"""Text to token ids and back, and the chat formats of the supported models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fluxion_jax.errors import ConfigError, UnsupportedError

# Special tokens that end a turn or a document, whatever file the tokenizer comes from.
_END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<end_of_turn>", "<|eot_id|>", "<|end_of_text|>")
_CHATML_START = "<|im_start|>"
_GEMMA_START = "<start_of_turn>"
_CHATML_SYSTEM = re.compile(r"<\|im_start\|>system(?:\n|\\n)([^<>{}']+)<\|im_end\|>")


class Tokenizer:
    """A tokenizer of the `tokenizers` library with the ids a generation loop needs.

    Attributes:
      bos_id: id that starts a sequence, or None.
      eos_ids: ids that end a generation, ascending.
      special_ids: ids that `decode` leaves out by default.
      vocab_size: number of ids.
    """

    def __init__(
        self,
        backend: Any,
        *,
        bos_id: int | None,
        eos_ids: Iterable[int],
        add_bos: bool,
        chat_template: str | None = None,
    ) -> None:
        """Wraps a tokenizer.

        Args:
          backend: a `tokenizers.Tokenizer`.
          bos_id: id that starts a sequence.
          eos_ids: ids that end a generation; the usual end tokens of the vocabulary are added.
          add_bos: whether sequences start with `bos_id`.
          chat_template: the Jinja template of the model's file, to recognise the chat format.
        """
        self._backend = backend
        self._add_bos = add_bos
        self._chat_template = chat_template or ""
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        ends = {i for i, token in added.items() if token.special and token.content in _END_TOKENS}
        self.eos_ids: tuple[int, ...] = tuple(sorted(ends | set(eos_ids)))
        self.bos_id = bos_id
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """Turns text into token ids; special tokens written out in the text become their ids.

        Args:
          text: any text.
          add_bos: whether to start with `bos_id`; None does as the model was trained.

        Raises:
          ConfigError: `add_bos` is true and the tokenizer has no such token.
        """
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        if self._add_bos if add_bos is None else add_bos:
            if self.bos_id is None:
                raise ConfigError(
                    "expected a tokenizer with a start token for add_bos=True, got one without; "
                    "leave add_bos out"
                )
            ids = [self.bos_id, *ids]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Turns token ids into text; bytes that are not UTF-8 become U+FFFD."""
        return str(self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special))

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Turns a conversation into the ids after which the model answers.

        Args:
          messages: mappings with "role" ("system", "user" or "assistant") and "content".

        Raises:
          ConfigError: no messages, or an unknown role.
          UnsupportedError: the model has no chat format, or another one than ChatML or Gemma's.
        """
        roles = [message["role"] for message in messages]
        if not roles or set(roles) - {"system", "user", "assistant"} or "system" in roles[1:]:
            raise ConfigError(
                "expected messages with the roles user and assistant, at most one system message "
                f"in front, got {roles}; correct the roles"
            )
        if _CHATML_START in self._chat_template:
            return self.encode(self._chatml(messages))
        if _GEMMA_START in self._chat_template:
            return self.encode(_gemma(messages), add_bos=True)
        got = "another template" if self._chat_template else "no template"
        raise UnsupportedError(
            f"expected a chat template in ChatML or Gemma format, got {got}; "
            "write the prompt yourself and use encode()"
        )

    def _chatml(self, messages: Sequence[Mapping[str, str]]) -> str:
        text = ""
        default = _CHATML_SYSTEM.search(self._chat_template)
        if default and messages[0]["role"] != "system":
            text = f"{_CHATML_START}system\n{default.group(1)}<|im_end|>\n"
        for message in messages:
            text += f"{_CHATML_START}{message['role']}\n{message['content']}<|im_end|>\n"
        return f"{text}{_CHATML_START}assistant\n"


def _gemma(messages: Sequence[Mapping[str, str]]) -> str:
    """Gemma has no system role: the first user message starts with what the system says."""
    prefix = ""
    if messages[0]["role"] == "system":
        prefix = messages[0]["content"] + "\n\n"
        messages = messages[1:]
    text = ""
    for message in messages:
        role = "model" if message["role"] == "assistant" else "user"
        text += f"{_GEMMA_START}{role}\n{prefix}{message['content'].strip()}<end_of_turn>\n"
        prefix = ""
    return f"{text}{_GEMMA_START}model\n"
