"""Runs Qwen3 models of other projects through their adapter and compares with their own full path.

    git clone https://github.com/jax-ml/bonsai && git clone https://github.com/google/tunix
    pip install jaxtyping
    python tools/check_third_party.py --bonsai bonsai --tunix tunix

Only the files of the models are executed, not what their packages import. The tests have decoders
written in the same two styles; this is what they are like the originals by.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import fluxion_jax as fx
from fluxion_jax.adapters import adapt_qwen3

VOCABULARY, WIDTH, FEED_FORWARD, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 96, 24, 40, 6, 2, 16, 2
TOKENS = np.random.default_rng(0).integers(1, VOCABULARY, (2, 420))
KNOWN_TOKENS = 399
LARGEST_DIFFERENCE = 1e-4

# A model, and its own log-probabilities [B, S, V].
Found = tuple[nnx.Module, jax.Array]


def module(root: Path, name: str) -> Any:
    """A module of a checkout, without running the `__init__` files on the way to it."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        package = types.ModuleType(".".join(parts[:count]))
        package.__path__ = [str(root.joinpath(*parts[:count]))]
        sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(name)


def randomise(model: nnx.Module) -> None:
    """Norms and biases too, so that one that is left out shows."""
    rng = np.random.default_rng(1)

    def draw(x: jax.Array) -> jax.Array:
        return jnp.asarray(rng.normal(size=x.shape) * 0.2 + (x.ndim == 1), x.dtype)

    nnx.update(model, jax.tree.map(draw, nnx.state(model, nnx.Param)))


def bonsai(root: Path) -> Found:
    theirs = module(root, "bonsai.models.qwen3.modeling")
    config = theirs.ModelConfig(
        num_layers=LAYERS,
        vocab_size=VOCABULARY,
        emb_dim=WIDTH,
        mlp_dim=FEED_FORWARD,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        num_kv_heads=KV_HEADS,
        rope_theta=1_000_000,
        rope_scaling_factor=8.0,
        local_rope_theta=1e4,
        norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    model = theirs.Qwen3(config, rngs=nnx.Rngs(0))
    randomise(model)
    cache = theirs.init_cache(config, *TOKENS.shape, 0, jnp.float32)
    segments = jnp.ones(TOKENS.shape, jnp.int32)
    return model, jax.nn.log_softmax(model(jnp.asarray(TOKENS), cache=cache, segment_ids=segments))


def tunix(root: Path, **changes: Any) -> Found:
    theirs = module(root, "tunix.models.qwen3.model")
    config = theirs.ModelConfig(
        num_layers=LAYERS,
        vocab_size=VOCABULARY,
        embed_dim=WIDTH,
        hidden_dim=FEED_FORWARD,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        num_kv_heads=KV_HEADS,
        rope_theta=1_000_000,
        norm_eps=1e-6,
        **changes,
    )
    model = theirs.Qwen3(config, rngs=nnx.Rngs(0))
    randomise(model)
    batch, tokens = TOKENS.shape
    positions = jnp.broadcast_to(jnp.arange(tokens), TOKENS.shape)
    mask = jnp.broadcast_to(jnp.tri(tokens, dtype=bool), (batch, tokens, tokens))
    return model, jax.nn.log_softmax(model(jnp.asarray(TOKENS), positions, None, mask)[0])


def difference(found: Found) -> float:
    """The largest of any log-probability behind a prefill and decode steps over everything."""
    theirs, expected = found
    model = adapt_qwen3(theirs)
    layout = dataclasses.replace(
        model.config.kv_layout("float32"), sink_tokens=16, recent_tokens=32
    )
    cache = fx.HostKV.allocate(layout, *TOKENS.shape)
    fx.prefill(model, TOKENS[:, :KNOWN_TOKENS], cache, chunk_tokens=128, progress=False)
    everything = fx.Execution(dense_below_tokens=0, measure=True)
    scores = fx.score(model, cache, TOKENS[:, KNOWN_TOKENS:], split=0.5, execution=everything)
    return float(np.abs(scores.distributions - expected[:, KNOWN_TOKENS:-1]).max())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bonsai", type=Path, help="a checkout of jax-ml/bonsai")
    parser.add_argument("--tunix", type=Path, help="a checkout of google/tunix")
    options = parser.parse_args()
    cases: dict[str, Callable[[], Found]] = {}
    if options.bonsai:
        cases["bonsai"] = lambda: bonsai(options.bonsai)
    if options.tunix:
        cases["tunix"] = lambda: tunix(options.tunix)
        cases["tunix, tied"] = lambda: tunix(options.tunix, use_tied_embedding=True)
        cases["tunix, experts"] = lambda: tunix(options.tunix, num_experts=4, num_experts_per_tok=2)
    if not cases:
        parser.error("expected a checkout, got none; name one with --bonsai or --tunix")
    jax.config.update("jax_default_matmul_precision", "highest")
    good = True
    for name, case in cases.items():
        found = difference(case())
        # Written so that NaN fails.
        good &= found <= LARGEST_DIFFERENCE
        print(f"{name:16} largest difference of a log-probability {found:.1e}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
