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

import fluxion_jax as fx
from fluxion_jax import adapters, modules
from fluxion_jax.models import Decoder, ModelConfig, load_model

PUBLIC = {
    name: thing for name, thing in vars(fx).items() if callable(thing) and not name.startswith("_")
}
MORE = {
    "modules.Attention": modules.Attention,
    "adapters.adapt": adapters.adapt,
    "adapters.adapt_qwen3": adapters.adapt_qwen3,
    "models.load_model": load_model,
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


def problems(name: str, function: Any) -> list[str]:
    """What a function's docstring lacks, by its signature and its body."""
    text = inspect.getdoc(function) or ""
    signature = inspect.signature(function)
    taken = [p for p in signature.parameters if p not in ("self", "cls")]
    found = [f"Args: {p}" for p in taken if not re.search(rf"^  \**{p}: \S", text, re.M)]
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


@pytest.mark.parametrize(
    "name", sorted(n for n, t in PUBLIC.items() if hasattr(t, "__annotations__"))
)
def test_fields_are_documented(name: str) -> None:
    thing = PUBLIC[name]
    if not inspect.isclass(thing) or issubclass(thing, Exception) or name == "Policy":
        return
    text = (inspect.getdoc(thing) or "").partition("Attributes:")[2]
    fields = [field for field in thing.__annotations__ if not field.startswith("_")]
    assert fields
    assert [f for f in fields if not re.search(rf"^  {f}: \S", text, re.M)] == []


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_examples_run(name: str) -> None:
    thing = PUBLIC[name]
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
