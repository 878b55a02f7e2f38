from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tokenizers

from tests.goldens import load as goldens

# As many as the tiny checkpoint has rows in its embedding table.
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWYZ.,?!:"
# A blank, a line feed, and a character that stands for content the demo cuts out again.
OTHERS = " \n\u241e"
SPECIAL = ("<s>", "<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with random weights, in the format of Hugging Face, with a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(goldens.HERE / "tiny_llama", folder)
    as_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    others = "".join(piece for piece, _ in as_bytes.pre_tokenize_str(OTHERS))
    vocabulary = {letter: i for i, letter in enumerate([*LETTERS, *others])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = as_bytes
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    assert backend.get_vocab_size() == 64
    backend.save(str(folder / "tokenizer.json"))
    template = "{{'<|im_start|>' + message['role']}}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text("What is the access code of the observatory?", encoding="utf-8")
    return path
