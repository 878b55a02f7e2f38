"""Everything public says what it takes, gives and raises, prints, and has an example that runs."""

from __future__ import annotations

import doctest
import inspect
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import fluxion_jax as fx
from fluxion_jax import adapters, generation, modules, planning, stats
from fluxion_jax.models import Decoder, LoadedModel, ModelConfig, load_model

PUBLIC = {
    name: thing for name, thing in vars(fx).items() if callable(thing) and not name.startswith("_")
}
MORE = {
    "adapters.adapt_qwen3": adapters.adapt_qwen3,
    "generation.Step": generation.Step,
    "models.LoadedModel": LoadedModel,
    "models.load_model": load_model,
    "modules.Attention": modules.Attention,
    "planning.Machine": planning.Machine,
    "planning.Memory": planning.Memory,
    "planning.Plan": planning.Plan,
    "planning.plan": planning.plan,
    "policy.Features": fx.policy.Features,
    "stats.DecodeStats": stats.DecodeStats,
}
# They come out of, or go into, what has an example.
WITHOUT_EXAMPLE = {name for name, thing in MORE.items() if inspect.isclass(thing)} - {
    "modules.Attention"
}


def methods(name: str, thing: type) -> Iterator[tuple[str, Any]]:
    for member, value in vars(thing).items():
        if member.startswith("_") and not (member == "__call__" and name in MORE):
            continue
        function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if isinstance(function, property):
            yield f"{name}.{member}", function.fget
        elif inspect.isfunction(function):
            yield f"{name}.{member}", inspect.unwrap(function)


def functions() -> Iterator[tuple[str, Any]]:
    for name, thing in {**PUBLIC, **MORE}.items():
        if inspect.isclass(thing):
            yield from methods(name, thing)
        else:
            yield name, inspect.unwrap(thing)


FUNCTIONS = dict(functions())


def described(text: str, name: str) -> str:
    """What a docstring says of an argument or a field."""
    found = re.search(rf"^  \**{name}: (.*(?:\n    .*)*)", text, re.M)
    return found[1] if found else ""


def has_shape(annotation: str, text: str) -> bool:
    """Whether an array's axes are named, here or where the text points."""
    if "Callable" in annotation or not re.search(r"Array|ndarray", annotation):
        return True
    said = r"\[[A-Z0-9]|scalar|\bint, or|\bsee `|\blikewise|\bindex of|\bpytree"
    return re.search(said, text) is not None


def problems(name: str, function: Any) -> list[str]:
    """What a function's docstring lacks, by its signature and its body."""
    text = inspect.getdoc(function) or ""
    signature = inspect.signature(function)
    taken = [p for p in signature.parameters if p not in ("self", "cls")]
    found = [f"Args: {p}" for p in taken if not re.search(rf"^  \**{p}: \S", text, re.M)]
    found += [
        f"shape: {p}"
        for p in taken
        if not has_shape(str(signature.parameters[p].annotation), described(text, p))
    ]
    found += ["Args:" for _ in taken[:1] if "Args:" not in text]
    returned = str(signature.return_annotation)
    if taken and returned != "None" and not re.search(r"^(Returns|Yields):$", text, re.M):
        found.append(f"Returns: {returned}")
    for error in set(re.findall(r"\braise (?:\w+\.)?(\w+Error)\(", inspect.getsource(function))):
        if error not in text.partition("Raises:")[2]:
            found.append(f"Raises: {error}")
    return found


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_arguments_results_and_errors_are_documented(name: str) -> None:
    assert problems(name, FUNCTIONS[name]) == []


def test_the_check_would_notice() -> None:
    def silent(shape: int, *, dtype: str) -> int:
        """Does something.

        Args:
          shape: one.
        """
        raise fx.ConfigError(dtype * shape)

    assert problems("silent", silent) == ["Args: dtype", "Returns: int", "Raises: ConfigError"]
    assert described("Args:\n  q: one\n    two\n  k: three", "q") == "one\n    two"
    assert has_shape("jax.Array", "int32 `[B, N]`, counts")
    assert not has_shape("jax.Array | None", "the queries")


EVERYTHING = {**PUBLIC, **MORE}


@pytest.mark.parametrize(
    "name",
    sorted(
        name
        for name, thing in EVERYTHING.items()
        if inspect.isclass(thing)
        and not issubclass(thing, Exception | nnx.Module)
        and name != "Policy"
    ),
)
def test_fields_are_documented(name: str) -> None:
    thing = EVERYTHING[name]
    text = (inspect.getdoc(thing) or "").partition("Attributes:")[2]
    fields = [field for field in thing.__annotations__ if not field.startswith("_")]
    assert fields
    assert [f for f in fields if not re.search(rf"^  {f}: \S", text, re.M)] == []
    annotations = {field: str(thing.__annotations__[field]) for field in fields}
    assert [f for f in fields if not has_shape(annotations[f], described(text, f))] == []


@pytest.mark.parametrize("name", sorted(EVERYTHING.keys() - WITHOUT_EXAMPLE))
def test_examples_run(name: str) -> None:
    thing = EVERYTHING[name]
    text = inspect.getdoc(thing) or ""
    assert "Example:" in text, "give it an example"
    test = doctest.DocTestParser().get_doctest(text, {}, name, None, 0)
    assert test.examples
    output: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL).run(test, out=output.append)
    assert not output, "".join(output)


def test_results_print_what_matters() -> None:
    model = Decoder.random(ModelConfig.tiny_llama())
    prompt = list(range(100))
    result = fx.generate(model, prompt, max_new_tokens=4)
    assert str(result).startswith("Result of 1 rows, the first [")
    assert "4 tokens in 4 steps" in str(result)
    cache = fx.HostKV.allocate(model.config.kv_layout("float32"), batch=1, max_tokens=512)
    fx.prefill(model, prompt, cache)
    scores = fx.score(model, cache, [[5, 6, 7, 8]])
    assert str(scores).startswith("Scores of 3 tokens in 1 rows, perplexity ")
    assert "lengths [103] of 512 tokens" in repr(cache)
    q, kv = jnp.ones((1, 4, 64)), jnp.ones((1, 2, 64))
    cache = fx.HostKV.allocate(fx.KVLayout(1, 2, 64, "float32"), batch=1, max_tokens=512)
    split = fx.policy.parse_split("host")
    stats = fx.decode_attention(q, kv, kv, cache, 0, fx.full(), scale=0.1, split=split)[2]
    assert "[1, 2] groups: blocks read by the host 0, by the device 0" in str(stats)
    assert str(fx.greedy()) == "greedy()"
    assert str(fx.top_p(0.9, top_k=5)) == "top_p(0.9, temperature=1, top_k=5)"
    assert repr(fx.KVLayout(1, 2, 64)).startswith("KVLayout(num_layers=1, num_kv_heads=2")
    assert repr(fx.cache_shardings(cache)).startswith("HostKV of ")
    assert "3 SingleDeviceSharding in pinned_host" in repr(fx.cache_shardings(cache))
    # As decode_attention did.
    assert "HostKV that a program has consumed" in repr(cache)
    assert [str(fx.parse_split(x)) for x in ("device", 0.5, "adaptive")] == [
        "device",
        "0.5",
        "adaptive",
    ]
    assert str(fx.fixed(16, 0.05)) == "fixed:16:0.05"
    assert str(fx.full()) == "full"
    plan = fx.Plan(
        jnp.full((1, 2), 32), jnp.asarray([[64, 0, 32, 8]]), jnp.asarray([[True, False]])
    )
    assert str(plan) == (
        "Plan of [1, 2] groups: units of 32 tokens; budgets of [1, 4] heads 0 to 64 tokens, "
        "mean 26; groups that rank once 1"
    )
    texts = []
    jax.make_jaxpr(lambda plan: texts.append(str(plan)))(plan)
    assert texts == ["Plan of [1, 2] groups, traced"]
    assert "dense_below_tokens=1024" in str(fx.Execution())
