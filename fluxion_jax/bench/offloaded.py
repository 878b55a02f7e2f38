"""`transformers` with its offloaded cache, as the step benchmark compares with it.

Run as a program of its own (`python -m fluxion_jax.bench.offloaded`), so that PyTorch's memory is
gone when it ends. Weights, keys and values are random; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fluxion_jax.errors import UnsupportedError
from fluxion_jax.models.config import ModelConfig

_LIMIT_S = 120


def measure(config: ModelConfig, context_tokens: int, calls: int) -> dict[str, Any]:
    """Seconds of decode steps of one sequence, in a process of its own.

    Args:
      config: the model's sizes; all its layers are there.
      context_tokens: cached before the first step.
      calls: timed steps.

    Raises:
      UnsupportedError: PyTorch or transformers cannot do it here; the text has the reason.
    """
    sizes = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": context_tokens + 64,
    }
    command = [sys.executable, "-m", "fluxion_jax.bench.offloaded"]
    options = [json.dumps(sizes), str(context_tokens), str(calls)]
    root = str(Path(__file__).parents[2])
    try:
        done = subprocess.run(
            [*command, *options],
            capture_output=True,
            text=True,
            check=False,
            timeout=_LIMIT_S,
            cwd=root,
        )
    except subprocess.TimeoutExpired as error:
        raise UnsupportedError(
            f"expected steps of transformers within {_LIMIT_S} s, got none; use a shorter context"
        ) from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UnsupportedError(
            f"expected transformers to decode with an offloaded cache, got {reason!r}; install "
            "torch with CUDA and transformers"
        )
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def _run(sizes: dict[str, Any], context_tokens: int, calls: int) -> dict[str, Any]:
    torch, transformers = (importlib.import_module(name) for name in ("torch", "transformers"))
    device = "cuda"
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=False)
    with torch.no_grad(), torch.device(device):
        previous = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        torch.set_default_dtype(previous)
        try:
            cache = transformers.DynamicCache(config=config, offloading=True)
        except TypeError:
            cache = transformers.OffloadedCache()
        shape = (1, sizes["num_key_value_heads"], context_tokens, sizes["head_dim"])
        for layer in range(sizes["num_hidden_layers"]):
            k, v = (torch.rand(shape, dtype=torch.bfloat16) for _ in range(2))
            cache.update(k, v, layer)
        token = torch.zeros((1, 1), dtype=torch.long)
        seconds = []
        for _ in range(calls + 1):
            torch.cuda.synchronize()
            start = time.perf_counter()
            model(input_ids=token, past_key_values=cache, use_cache=True)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"step_s": seconds[1:], "versions": versions}


def main() -> None:
    """Measures what the command line says and prints it as one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("sizes", type=json.loads)
    parser.add_argument("context_tokens", type=int)
    parser.add_argument("calls", type=int)
    arguments = parser.parse_args()
    print(json.dumps(_run(arguments.sizes, arguments.context_tokens, arguments.calls)))


if __name__ == "__main__":
    main()
