"""Values of any type in place of any argument: an error of this library that names it, or none.

What is accepted is listed, so that a check that is lost is noticed, and one that is too strict.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fluxion_jax as fx
from fluxion_jax.adapters import adapt, adapt_qwen3
from fluxion_jax.models import Decoder, ModelConfig, load_model
from fluxion_jax.modules import Attention
from fluxion_jax.planning import Machine, plan
from fluxion_jax.policy import parse_split

VALUES: dict[str, Any] = {
    "None": None,
    "text": "x",
    "bytes": b"x",
    "-1": -1,
    "0": 0,
    "1.5": 1.5,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "True": True,
    "list": [],
    "dict": {"a": 1},
    "object": object(),
    "matrix": np.zeros((2, 2)),
    "ragged": [[1, 2], [3]],
    "texts": np.asarray(["a"]),
    "huge": 10**30,
    "JAX array": jnp.zeros(3),
    "JAX scalar": jnp.asarray(0),
    "set": set(),
}
MODEL = Decoder.random(ModelConfig.tiny_llama())
LAYOUT = fx.KVLayout(1, 2, 8, "float32", sink_tokens=0, recent_tokens=16)
OF_MODEL = MODEL.config.kv_layout("float32")


class Other(nnx.Module):
    def __init__(self) -> None:
        self.tokens = nnx.Embed(8, 16, rngs=nnx.Rngs(0))
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0))])


def attend(**arguments: Any) -> None:
    names = ("q", "k_new", "v_new", "cache", "layer", "policy")
    fx.decode_attention(*[arguments.pop(name) for name in names], **arguments)


def consumed(model: Any, prompts: Any, **options: Any) -> None:
    fx.stream(model, prompts, **options)


def planned(model: Any, **options: Any) -> None:
    plan(model, **options)


# Each entry: the call, good arguments, and of each argument what else is accepted.
KV = np.zeros((1, 20, 2, 8), np.float32)
ENTRIES: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, str]]] = {
    "stream": (
        consumed,
        {"model": MODEL, "prompts": [1, 2], "max_new_tokens": 1},
        {
            "prompts": "ragged JAX scalar",
            "max_new_tokens": "",
            "model": "",
            "policy": "None",
            "sampling": "None",
            "stop_tokens": "None list set",
            "cache": "None",
            "split": "None 0 True JAX scalar",
            "execution": "None",
            "seed": "-1 0",
            "chunk_tokens": "",
        },
    ),
    "prefill": (
        fx.prefill,
        {"model": MODEL, "prompts": [1, 2], "cache": None, "progress": False},
        {"model": "", "prompts": "JAX scalar", "cache": "", "chunk_tokens": ""},
    ),
    "score": (
        fx.score,
        {"model": MODEL, "cache": None, "tokens": [[1, 2]], "progress": False},
        {"model": "", "cache": "", "tokens": "", "policy": "None"},
    ),
    "HostKV.allocate": (
        fx.HostKV.allocate,
        {"layout": LAYOUT, "batch": 1, "max_tokens": 64},
        {"layout": "", "batch": "", "max_tokens": "", "mesh": "None", "axis": "None"},
    ),
    "HostKV.from_arrays": (
        fx.HostKV.from_arrays,
        {"layout": LAYOUT, "k": [KV], "v": [KV], "lengths": [20], "max_tokens": 64},
        {"layout": "", "k": "", "v": "", "lengths": "", "max_tokens": ""},
    ),
    "HostKV.load": (fx.HostKV.load, {"path": None}, {"path": ""}),
    "HostKV.save": (
        lambda path: fx.HostKV.allocate(LAYOUT, 1, 64).save(path),
        {"path": None},
        {"path": "text"},
    ),
    "HostKV.reset": (
        lambda rows: fx.HostKV.allocate(LAYOUT, 1, 64).reset(rows),
        {"rows": None},
        {"rows": "None 0 list JAX scalar"},
    ),
    "HostKV.fork": (
        lambda rows: fx.HostKV.allocate(LAYOUT, 1, 64).fork(rows),
        {"rows": None},
        {"rows": "None 0 JAX scalar"},
    ),
    "HostKV.advance": (
        lambda count: fx.HostKV.allocate(LAYOUT, 1, 64).advance(count),
        {"count": 1},
        {"count": "0 JAX scalar"},
    ),
    "KVLayout": (
        fx.KVLayout,
        {"num_layers": 2, "num_kv_heads": 2, "head_dim": 64},
        {
            "num_layers": "huge",
            "num_kv_heads": "huge",
            "head_dim": "",
            "dtype": "",
            "sink_tokens": "0 huge",
            "recent_tokens": "huge",
            "summaries": "",
            "sliding_window": "None -1 0 huge",
            "sliding_layers": "",
            "num_heads": "None huge",
            "sketch": "",
        },
    ),
    "fixed": (
        fx.fixed,
        {"granularity_tokens": 16, "budget_fraction": 0.1},
        {"granularity_tokens": "", "budget_fraction": "True"},
    ),
    "parse_policy": (fx.parse_policy, {"policy": "full"}, {"policy": ""}),
    "parse_split": (parse_split, {"split": "host"}, {"split": "None 0 True JAX scalar"}),
    "top_p": (
        fx.top_p,
        {"p": 0.9},
        {"p": "True", "temperature": "1.5 True huge", "top_k": "None huge"},
    ),
    "Execution": (
        fx.Execution,
        {},
        {
            "host": "None",
            "device": "None",
            "dense_below_tokens": "0",
            "measure": "True",
            "record": "True",
        },
    ),
    "jit": (
        fx.jit,
        {"function": lambda a: a},
        {
            "function": "",
            "static_argnames": "list dict set texts",
            "donate_argnames": "list dict set texts",
        },
    ),
    "load_model": (load_model, {"path_or_name": "recall-12m"}, {"path_or_name": ""}),
    "calibrate": (fx.calibrate, {"model": None}, {"model": ""}),
    "plan": (
        planned,
        {"model": "8b", "context_tokens": 1000},
        {
            "model": "",
            "context_tokens": "",
            "batch": "",
            "policy": "",
            "dtype": "",
            "summaries": "",
            "split": "",
            "machine": "None",
        },
    ),
    "Machine.load": (Machine.load, {"path_or_name": "h100"}, {"path_or_name": ""}),
    "adapt_qwen3": (adapt_qwen3, {"model": None}, {"model": ""}),
    "adapt": (
        adapt,
        {
            "model": Other(),
            "embed": lambda m, tokens, positions: m.tokens(tokens),
            "layers": lambda m: m.layers,
            "qkv": lambda layer, x, positions: (x.reshape(*x.shape[:2], 2, 8),) * 3,
            "finish": lambda layer, x, attended: x,
            "logits": lambda m, x: x,
        },
        {
            "model": "",
            "embed": "",
            "layers": "",
            "qkv": "",
            "finish": "",
            "logits": "",
            "scale": "None -1 0 1.5 True huge JAX scalar",
            "sliding_window": "None",
            "sliding_layers": "list",
        },
    ),
    "Attention": (
        Attention,
        {"d_model": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rngs": nnx.Rngs(0)},
        {
            "d_model": "",
            "num_heads": "",
            "num_kv_heads": "",
            "head_dim": "",
            "rngs": "",
            "rope": "None",
            "scale": "None -1 0 1.5 True huge JAX scalar",
            "sliding_window": "None",
            "qk_norm_eps": "None -1 0 1.5 True huge JAX scalar",
        },
    ),
    "decode_attention": (
        attend,
        {
            "q": np.zeros((1, 4, 8), np.float32),
            "k_new": np.zeros((1, 2, 8), np.float32),
            "v_new": np.zeros((1, 2, 8), np.float32),
            "cache": None,
            "layer": 0,
            "policy": fx.full(),
            "scale": 1.0,
            "split": parse_split("host"),
        },
        {
            "q": "",
            "k_new": "",
            "v_new": "",
            "cache": "",
            "layer": "0 JAX scalar",
            "policy": "",
            "scale": "-1 0 1.5 True huge JAX scalar",
            "split": "",
            "execution": "None",
        },
    ),
}
# Arguments of which the value None means that a cache of this layout has to be allocated.
CACHES = {"prefill": OF_MODEL, "score": OF_MODEL, "decode_attention": LAYOUT}
CASES = [
    (entry, argument) for entry, (_, _, arguments) in ENTRIES.items() for argument in arguments
]


@pytest.mark.parametrize(("entry", "argument"), CASES, ids=lambda text: text)
def test_anything(
    entry: str, argument: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call, good, arguments = ENTRIES[entry]
    accepted, messages = [], {}
    for name, value in VALUES.items():
        given = dict(good)
        if entry in CACHES:
            given["cache"] = fx.HostKV.allocate(CACHES[entry], 1, 512)
        given[argument] = value
        try:
            call(**given)
        except fx.FluxionError as error:
            messages[name] = str(error)
        else:
            accepted.append(name)
    wanted = [name for name in VALUES if f" {name} " in f" {arguments[argument]} "]
    assert accepted == wanted
    assert not {name: text for name, text in messages.items() if "expected" not in text}
    assert os.listdir(tmp_path) == (["x"] if entry == "HostKV.save" else [])


def test_what_is_accepted_here_is_no_less_than_what_is_needed() -> None:
    """The good arguments are good, or every value would be refused for another reason."""
    for entry, (call, good, _) in ENTRIES.items():
        if entry in ("calibrate", "adapt_qwen3", "HostKV.load", "HostKV.save"):
            continue
        given = dict(good)
        if entry in CACHES:
            given["cache"] = fx.HostKV.allocate(CACHES[entry], 1, 512)
        call(**given)
