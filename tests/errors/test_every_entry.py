"""Bad input ends in a readable error of this library, through whichever public entry it comes."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from flax import nnx

import fluxion_jax as fx
from fluxion_jax import cli
from fluxion_jax.adapters import adapt
from fluxion_jax.models import Decoder, ModelConfig, load_model
from fluxion_jax.modules import Attention
from fluxion_jax.planning import plan
from fluxion_jax.policy import parse_split

MODEL = Decoder.random(ModelConfig.tiny_llama())
LAYOUT = MODEL.config.kv_layout("float32")
NAN = float("nan")


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.qkv = nnx.LinearGeneral(16, (3, 2, 8), rngs=rngs)
        self.out = nnx.LinearGeneral((2, 8), 16, axis=(-2, -1), rngs=rngs)


class Other(nnx.Module):
    """A decoder that knows nothing of this library."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(32, 16, rngs=rngs)
        self.layers = nnx.List([Layer(rngs)])


PARTS = {
    "embed": lambda model, tokens, positions: model.embed(tokens),
    "layers": lambda model: model.layers,
    "qkv": lambda layer, x, positions: tuple(jnp.moveaxis(layer.qkv(x), 2, 0)),
    "finish": lambda layer, x, attended: x + layer.out(attended),
    "logits": lambda model, x: model.embed.attend(x),
}
OTHER = Other(nnx.Rngs(0))
ADAPTED = adapt(OTHER, **PARTS)
ATTENTION = Attention(16, 4, 2, 8, rngs=nnx.Rngs(0))


def cache(layout=LAYOUT, batch=1, max_tokens=512):
    return fx.HostKV.allocate(layout, batch, max_tokens)


def stream(model, prompts, **options):
    return list(fx.stream(model, prompts, **options))


GENERATING = {
    "generate": (fx.generate, MODEL),
    "stream": (stream, MODEL),
    "generate, adapted": (fx.generate, ADAPTED),
}
BAD_REQUESTS = {
    "no prompt": ([], {}, "at least one prompt"),
    "empty prompt": ([[]], {}, "at least one token in prompt 0"),
    "text": ("text", {}, "integer token ids"),
    "float ids": ([0.5, 1.0], {}, "integer token ids, got float64"),
    "NaN ids": ([NAN], {}, "integer token ids, got float64"),
    "negative id": ([1, -1], {}, r"within \[0, .*got \[-1\]"),
    "unknown id": ([1, 10**6], {}, r"within \[0, .*got \[1000000\]"),
    "no tokens": ([1], {"max_new_tokens": 0}, "max_new_tokens >= 1, got 0"),
    "half a token": ([1], {"max_new_tokens": 0.5}, "max_new_tokens >= 1, got 0.5"),
    "no chunk": ([1], {"chunk_tokens": -1}, "chunk_tokens >= 1, got -1"),
    "policy": ([1], {"policy": "fixed:17:0.05"}, "granularity"),
    "policy's budget": ([1], {"policy": "fixed:16:nan"}, "budget fraction"),
    "policy's name": ([1], {"policy": "best"}, "got 'best'"),
    "policy's type": ([1], {"policy": 0.05}, "a plan method, got float"),
    "no calibration": ([1], {"policy": "fluxion"}, "calibrat"),
    "tolerance": ([1], {"policy": "fluxion:tolerance=-1"}, "tolerance above 0, got -1"),
    "replay": ([1], {"policy": "replay:none.npz"}, "none.npz"),
    "split": ([1], {"split": 2.0}, r"host fraction in \[0, 1\], got 2.0"),
    "split's name": ([1], {"split": "gpu"}, "got 'gpu'"),
    "sampling": ([1], {"sampling": 0.7}, "Sampling"),
    "execution": ([1], {"execution": "native"}, "Execution"),
    "cache": ([1], {"cache": "none"}, "HostKV"),
    "stop tokens": ([1], {"stop_tokens": ["</s>"]}, "stop_tokens"),
    "seed": ([1], {"seed": "zero"}, "seed"),
}


@pytest.mark.parametrize("request_", sorted(BAD_REQUESTS))
@pytest.mark.parametrize("entry", GENERATING)
def test_generating(entry, request_):
    call, model = GENERATING[entry]
    prompts, options, message = BAD_REQUESTS[request_]
    with pytest.raises(fx.FluxionError, match=message):
        call(model, prompts, **options)


@pytest.mark.parametrize("model", [None, "smollm2", 5, object()])
def test_something_that_is_no_model(model):
    for call in (fx.generate, stream, lambda m, p: fx.prefill(m, p, cache())):
        with pytest.raises(fx.ConfigError, match=r"expected .*model.*got"):
            call(model, [1])
    with pytest.raises(fx.ConfigError, match=r"expected .*model.*got"):
        fx.score(model, cache(), [[1, 2]])


@pytest.mark.parametrize("given", [None, "cache", 5, {"k": 1}])
def test_something_that_is_no_cache(given):
    for call in (
        lambda: fx.prefill(MODEL, [1], given),
        lambda: fx.score(MODEL, given, [[1, 2]]),
        lambda: fx.cache_shardings(given),
    ):
        with pytest.raises(fx.ConfigError, match="expected a HostKV"):
            call()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((LAYOUT, 0, 512), fx.ConfigError, "integer batch >= 1, got 0"),
        ((LAYOUT, -1, 512), fx.ConfigError, "batch >= 1"),
        ((LAYOUT, 1, 0), fx.ConfigError, "max_tokens >= 1"),
        ((LAYOUT, 1.5, 512), fx.ConfigError, "integer"),
        ((LAYOUT, 1, 512.0), fx.ConfigError, "integer"),
        ((LAYOUT, 1, NAN), fx.ConfigError, "integer"),
        ((LAYOUT, "1", 512), fx.ConfigError, "integer"),
        ((LAYOUT, 1, 1 << 30), fx.ConfigError, "memory"),
        ((LAYOUT, 1, 1 << 50), fx.ConfigError, "integer max_tokens below"),
        (("8b", 1, 512), fx.ConfigError, "KVLayout"),
    ],
)
def test_allocating(arguments, error, message):
    with pytest.raises(error, match=message):
        fx.HostKV.allocate(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers"),
        ({"num_kv_heads": 0}, "num_kv_heads"),
        ({"num_layers": 1.5}, "num_layers"),
        ({"head_dim": 12}, "multiple of 8"),
        ({"head_dim": 512}, "up to 256"),
        ({"dtype": "int8"}, "dtype"),
        ({"sink_tokens": 8}, "sink_tokens"),
        ({"recent_tokens": 0}, "recent_tokens"),
        ({"recent_tokens": -16}, "recent_tokens"),
        ({"summaries": "disk"}, "summaries"),
        ({"sliding_layers": (0,)}, "sliding_window"),
        ({"sliding_layers": (9,), "sliding_window": 64}, "sliding_layers"),
        ({"num_heads": 3}, "num_heads"),
        ({"sketch": True}, "num_heads"),
    ],
)
def test_layouts(change, message):
    with pytest.raises(fx.ConfigError, match=message):
        fx.KVLayout(**{"num_layers": 2, "num_kv_heads": 2, "head_dim": 64, **change})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c, _: c.reset([5]), fx.ConfigError, r"rows within \[0, 1\)"),
        (lambda c, _: c.reset([0.5]), fx.ConfigError, "row numbers"),
        (lambda c, _: c.fork([-1]), fx.ConfigError, r"rows within \[0, 1\)"),
        (lambda c, _: c.fork([]), fx.ConfigError, "at least one row"),
        (lambda c, _: c.require_room(513), fx.CacheFullError, "max_tokens=512"),
        (lambda c, _: c.advance(513).check(), fx.CacheFullError, "max_tokens=512"),
        (lambda c, folder: c.save(folder), fx.ConfigError, "the name of a file"),
        (lambda c, folder: fx.HostKV.load(folder / "none"), fx.ConfigError, "check the path"),
        (
            lambda c, _: c.note_non_finite(jnp.asarray([[NAN]]), jnp.asarray([True])).check(),
            fx.FluxionError,
            "finite logits",
        ),
    ],
)
def test_caches(call, error, message, tmp_path):
    with pytest.raises(error, match=message):
        call(cache(), tmp_path)


def attend(cache, *, q=(1, 4, 8), k=(1, 2, 8), layer=0, dtype=jnp.float32, **options):
    options = {"policy": fx.full(), "scale": 1.0, "split": parse_split("host"), **options}
    k = jnp.zeros(k, dtype)
    return fx.decode_attention(jnp.zeros(q, dtype), k, k, cache, layer, **options)


SMALL = fx.KVLayout(2, 2, 8, "float32", sliding_window=16, sliding_layers=(1,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q": (1, 3, 8)}, "multiple of 2 query heads"),
        ({"q": (2, 4, 8)}, "q of shape"),
        ({"q": (1, 4, 16)}, "q of shape"),
        ({"q": (1, 130, 8)}, "at most 64 query heads"),
        ({"k": (1, 2, 16)}, "k_new of shape"),
        ({"k": (1, 4, 8)}, "k_new of shape"),
        ({"layer": 1}, "a global layer"),
        ({"layer": -1}, "a global layer"),
        ({"dtype": jnp.int32}, "float"),
        ({"policy": "full"}, "policy"),
        ({"split": "host"}, "split"),
        ({"scale": NAN}, "scale"),
        ({"execution": "native"}, "Execution"),
    ],
)
def test_decode_attention(options, message):
    with pytest.raises(fx.FluxionError, match=message):
        attend(cache(SMALL), **options)


X = jnp.zeros((1, 1, 16))
STEP = {"policy": fx.full(), "split": parse_split("host")}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: ATTENTION(jnp.zeros((1, 16))), r"x of shape \[B, S, 16\]"),
        (lambda c: ATTENTION(jnp.zeros((1, 3, 8))), r"x of shape \[B, S, 16\]"),
        (lambda c: ATTENTION.decode(jnp.zeros((1, 2, 16)), c, 0, **STEP), r"\[1, 1, 16\]"),
        (lambda c: ATTENTION.decode(jnp.zeros((3, 1, 16)), c, 0, **STEP), r"\[1, 1, 16\]"),
        (lambda c: ATTENTION.decode(X, c, 1, **STEP), "a global layer"),
        (lambda c: ATTENTION.decode(X, c, 9, **STEP), "a global layer"),
        (lambda c: ATTENTION.prefill(X, jnp.asarray([1, 1]), c, 0), r"count .*\[1\]"),
        (lambda c: ATTENTION.prefill(X, jnp.asarray([0.5]), c, 0), "count"),
        (lambda c: ATTENTION.prefill(jnp.zeros((2, 1, 16)), jnp.asarray([1]), c, 0), "x of shape"),
        (lambda c: ATTENTION.decode(X, cache(LAYOUT), 0, **STEP), "KV heads|head size|shape"),
        (lambda c: Attention(16, 4, 3, 8, rngs=nnx.Rngs(0)), "multiple of num_kv_heads"),
        (lambda c: Attention(16, 4, 2, 7, rngs=nnx.Rngs(0)), "even head_dim"),
        (lambda c: Attention(16, 4, 2, 8, rngs=nnx.Rngs(0), sliding_window=0), "at least 1 token"),
        (lambda c: ATTENTION.decode(X, None, 0, **STEP), "expected a HostKV"),
    ],
)
def test_the_attention_module(call, message):
    with pytest.raises(fx.ConfigError, match=message):
        call(cache(SMALL))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {
                "qkv": lambda layer, x, p: tuple(
                    jnp.swapaxes(y, 1, 2) for y in PARTS["qkv"](layer, x, p)
                )
            },
            "put heads before the head size",
        ),
        ({"qkv": lambda layer, x, p: PARTS["qkv"](layer, x, p)[:2]}, "qkv to return"),
        ({"finish": lambda layer, x, a: a}, "finish to return"),
        ({"logits": lambda model, x: x[0]}, "logits"),
        ({"layers": lambda model: []}, "at least one layer"),
        ({"scale": NAN}, "scale"),
        ({"sliding_layers": (3,), "sliding_window": 8}, "sliding_layers"),
        ({"sliding_layers": (0,)}, "sliding_window"),
    ],
)
def test_adapters(change, message):
    with pytest.raises(fx.ConfigError, match=message):
        adapt(OTHER, **{**PARTS, **change})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fx.fixed(17, 0.5), fx.ConfigError, "granularity"),
        (lambda: fx.fixed(16, 0.0), fx.ConfigError, "budget fraction"),
        (lambda: fx.fixed(16, NAN), fx.ConfigError, "budget fraction"),
        (lambda: fx.fixed("16", "0.5"), fx.ConfigError, "granularity"),
        (lambda: fx.top_p(0.0), fx.ConfigError, "top-p"),
        (lambda: fx.top_p(NAN), fx.ConfigError, "top-p"),
        (lambda: fx.top_p(temperature=-1.0), fx.ConfigError, "temperature"),
        (lambda: fx.top_p(temperature=NAN), fx.ConfigError, "temperature"),
        (lambda: fx.top_p(top_k=0), fx.ConfigError, "top_k"),
        (lambda: fx.parse_policy(""), fx.ConfigError, "fixed:GRANULARITY"),
        (lambda: fx.parse_policy("oracle:x"), fx.ConfigError, "number"),
        (lambda: fx.parse_policy(None), fx.ConfigError, "policy name"),
        (lambda: fx.Execution(host="cuda"), fx.ConfigError, "out of"),
        (lambda: fx.jit(lambda *a: a), fx.ConfigError, "all have names"),
        (lambda: fx.jit(lambda a: a, static_argnames=("b",)), fx.ConfigError, "expected names"),
        (lambda: fx.jit(lambda a: a)("text"), fx.ConfigError, "expected arrays"),
        (lambda: load_model("none.gguf"), fx.FluxionError, "none.gguf"),
        (lambda: load_model("recall-12m", dtype="int4"), fx.ConfigError, "dtype"),
        (lambda: plan("8b", context_tokens=0), fx.ConfigError, "context_tokens"),
        (lambda: plan("8b", context_tokens=8, dtype="int4"), fx.ConfigError, "dtype"),
        (lambda: fx.calibrate("none.gguf"), fx.FluxionError, "none.gguf"),
    ],
)
def test_values(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["evaluate", "--model", "none.gguf"], 2, "none.gguf"),
        (["evaluate", "--policy", "half"], 2, "half"),
        (["evaluate", "--task", "chess"], 2, "chess"),
        (["evaluate", "--length", "-5"], 2, "length"),
        (["evaluate", "--samples", "0"], 2, "samples"),
        (["evaluate", "--data", "longbench:none"], 2, "none"),
        (["evaluate", "--data", "squad:none"], 2, "squad"),
        (["evaluate", "--protocol", "none.json"], 1, "none.json"),
        (["calibrate", "--model", "none.gguf"], 2, "none.gguf"),
        (["calibrate", "--model", "recall-12m", "--texts", "1"], 2, "texts"),
        (["calibrate", "--model", "recall-12m", "--data", "none.txt"], 2, "none.txt"),
        (["generate", "--model", "none.gguf", "--prompt-file", __file__], 2, "none.gguf"),
        (["plan", "--model", "8b", "--context", "-1"], 2, "context_tokens"),
    ],
)
def test_the_command_line(arguments, code, message, capsys):
    try:
        got = cli.main(arguments)
    except SystemExit as end:
        got = end.code
    captured = capsys.readouterr()
    assert got == code
    assert message in captured.err
    assert "Traceback" not in captured.err
