"""Generates with a tiny random model, to see that an installed package works at all.

python tiny_generation.py --expect native|xla
"""

from __future__ import annotations

import argparse

import numpy as np

import fluxion_jax as fx
from fluxion_jax.models.config import ModelConfig
from fluxion_jax.models.decoder import Decoder


def main() -> None:
    parser = argparse.ArgumentParser(description="Generates with a tiny random model.")
    parser.add_argument("--expect", required=True, help="host operations that have to be in use")
    expected = parser.parse_args().expect
    model = Decoder.random(ModelConfig.tiny_llama())
    prompt = np.arange(1500) % model.config.vocab_size
    result = fx.generate(model, prompt, policy="fixed:16:0.05", max_new_tokens=8)
    print(result.stats)
    if result.stats.host != expected or len(result.tokens[0]) != 8:
        raise SystemExit(
            f"expected 8 tokens through {expected}, got {len(result.tokens[0])} through "
            f"{result.stats.host}"
        )


if __name__ == "__main__":
    main()
