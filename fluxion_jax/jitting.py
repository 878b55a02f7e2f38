"""`fluxion_jax.jit`: `jax.jit` with the two things a host-resident cache needs done right.

A cache is updated in place only if the program donates it and says that its results live in pinned
host memory. Without the first, every step copies the whole cache; without the second, a GPU refuses
to compile. This wrapper does both for every `HostKV` among the arguments.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fluxion_jax.cache.host_kv import CONSUMED, HostKV, cache_shardings
from fluxion_jax.cache.placement import Placement, array_sharding
from fluxion_jax.compilations import compilations
from fluxion_jax.errors import ConfigError, FluxionError, is_iterable

P = ParamSpec("P")
R = TypeVar("R")


# Sets of constants whose hashes are kept.
_REMEMBERED = 32


def _is_cache(x: Any) -> bool:
    return isinstance(x, HostKV)


def jit(
    function: Callable[P, R],
    *,
    static_argnames: Sequence[str] = (),
    donate_argnames: Sequence[str] = (),
) -> Callable[P, R]:
    """Compiles a function that takes and returns a `HostKV`, updating it in place.

    Args:
      function: pure, as for `jax.jit`. Each argument that is itself a `HostKV` is donated; a cache
        nested in another argument is donated if that argument is named in `donate_argnames`.
      static_argnames: names of arguments that are compile-time constants, as for `jax.jit`.
      donate_argnames: names of further arguments whose buffers the program may reuse.

    Returns:
      The compiled function. A cache given to it is consumed: go on with the one it returns. Its
      attribute `compilations()` counts the programs compiled for it, and `trace(...)` returns what
      `jax.jit(...).trace` does; it takes shapes for arrays.

    Raises:
      ConfigError: an argument of the function has no name of its own (`*args`, `**kwargs`,
        positional-only), or a given name is none of them.
      FluxionError: at a call, an argument's buffers have been consumed by an earlier one.

    Example:
      >>> import fluxion_jax as fx
      >>> @fx.jit
      ... def count(cache):
      ...     return cache.advance(3)
      >>> cache = fx.HostKV.allocate(fx.KVLayout(1, 2, 64), batch=2, max_tokens=512)
      >>> cache = count(cache)
      >>> cache.lengths.tolist(), count.compilations()
      ([3, 3], 1)
    """
    if not callable(function):
        raise ConfigError(f"expected a function to compile, got {type(function).__name__}")
    for names in (static_argnames, donate_argnames):
        given: Any = names
        listed = is_iterable(given) and not isinstance(given, str)
        if not listed or not all(isinstance(name, str) for name in given):
            raise ConfigError(f"expected a list of arguments' names, got {names!r}")
    signature = inspect.signature(function)
    _check_signature(function, signature, (*static_argnames, *donate_argnames))
    programs: dict[Any, Any] = {}
    constants = functools.lru_cache(maxsize=_REMEMBERED)(_Constants)

    def prepare(
        also: tuple[type, ...], *args: P.args, **kwargs: P.kwargs
    ) -> tuple[_Program, dict[str, Any]]:
        bound = signature.bind(*args, **kwargs)
        dynamic = {k: v for k, v in bound.arguments.items() if k not in static_argnames}
        static = {k: v for k, v in bound.arguments.items() if k in static_argnames}
        named = constants(tuple((k, _Same(v)) for k, v in sorted(static.items())))
        caches = [name for name, value in dynamic.items() if _is_cache(value)]
        key = (jax.tree.structure(dynamic), named)
        program = programs.get(key)
        if program is None:
            whole = functools.partial(_call_by_name, function, static)
            _check_arrays(dynamic, also)
            shapes = jax.eval_shape(whole, dynamic)
            donated = sorted({*caches, *donate_argnames} & dynamic.keys())
            program = _Program(whole, donated, dynamic, shapes)
            programs[key] = program
        return program, dynamic

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        program, dynamic = prepare((), *args, **kwargs)
        return program(dynamic)  # type: ignore[no-any-return]

    def trace(*args: P.args, **kwargs: P.kwargs) -> Any:
        program, dynamic = prepare((jax.ShapeDtypeStruct,), *args, **kwargs)
        return program.trace(dynamic)

    call.trace = trace  # type: ignore[attr-defined]
    call.compilations = lambda: sum(p.compilations for p in programs.values())  # type: ignore[attr-defined]
    return call


class _Same:
    """An object, equal to itself only."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


class _Constants:
    """Compile-time constants, hashed once.

    A model's graph takes milliseconds to hash, and a decode loop calls with the same one.
    """

    def __init__(self, named: tuple[tuple[str, _Same], ...]) -> None:
        self._items = tuple((name, same.value) for name, same in named)
        self._hash = hash(tuple((name, _hashed(value)) for name, value in self._items))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Constants) and self._items == other._items


def _hashed(value: Any) -> int:
    """A hash of a constant; of a model's graph even if it holds a configuration that has none."""
    try:
        return hash(value)
    except TypeError:
        if jax.tree.leaves(value):
            raise
        # As `jax.jit` keys a pytree without leaves: by its type, then by equality.
        return hash(jax.tree.structure(value))


def _check_signature(
    function: Callable[..., Any], signature: inspect.Signature, names: Sequence[str]
) -> None:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for parameter in signature.parameters.values():
        if parameter.kind not in named:
            raise ConfigError(
                f"expected a function whose arguments all have names, got {parameter} in "
                f"{function.__name__}{signature}; give each argument a name of its own"
            )
    unknown = [name for name in names if name not in signature.parameters]
    if unknown:
        raise ConfigError(
            f"expected names out of {list(signature.parameters)}, got {unknown}; correct "
            "static_argnames or donate_argnames"
        )


def _check_arrays(dynamic: dict[str, Any], also: tuple[type, ...]) -> None:
    allowed = (jax.Array, np.ndarray, np.generic, int, float, complex, *also)
    for name, value in dynamic.items():
        for leaf in jax.tree.leaves(value):
            if not isinstance(leaf, allowed):
                raise ConfigError(
                    f"expected arrays and pytrees of them in argument {name!r}, got "
                    f"{type(leaf).__name__}; decorate its class with "
                    "jax.tree_util.register_dataclass or register_static, or name the argument in "
                    "static_argnames"
                )


def _shardings(tree: Any, placement: Placement | None) -> Any:
    """Where every leaf lies: a cache where it says, the rest in device memory.

    Beside a cache on several devices an array keeps the mesh that it is on; what is on none is
    repeated on all of them, and so are results.
    """
    whole = array_sharding(placement, PartitionSpec())

    def place(x: Any) -> Any:
        if _is_cache(x):
            return cache_shardings(x)
        sharding = getattr(x, "sharding", None)
        if placement is None or not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
            return whole
        return NamedSharding(placement.mesh, sharding.spec)

    return jax.tree.map(place, tree, is_leaf=_is_cache)


def _put_on_mesh(x: Any, sharding: jax.sharding.Sharding) -> Any:
    """Puts an array that is on no mesh on that of the program.

    An array's mesh is part of its type, whatever shardings are stated: without this, a program
    would be compiled again as soon as its arguments are results, which are on the mesh.
    """
    if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer):
        return x
    # Where devices belong to other processes, putting would first compare the values of them all.
    if isinstance(x.sharding, NamedSharding) or not sharding.is_fully_addressable:
        return x
    return jax.device_put(x, sharding)


def _placement(dynamic: dict[str, Any]) -> Placement | None:
    caches = [x for x in jax.tree.leaves(dynamic, is_leaf=_is_cache) if _is_cache(x)]
    placements = {cache.placement for cache in caches}
    if len(placements) > 1:
        raise ConfigError(
            f"expected caches on the same devices, got {placements}; allocate them with one mesh"
        )
    return next(iter(placements), None)


def _call_by_name(
    function: Callable[..., Any], static: dict[str, Any], dynamic: dict[str, Any]
) -> Any:
    return function(**dynamic, **static)


class _Program:
    """A jitted function of two dictionaries: what is donated, and what is kept."""

    def __init__(
        self,
        whole: Callable[..., Any],
        donated: list[str],
        arguments: dict[str, Any],
        results: Any,
    ) -> None:
        self._donated = donated
        placement = _placement(arguments)
        self.compilations = 0

        def split_call(donated: dict[str, Any], kept: dict[str, Any]) -> Any:
            return whole({**donated, **kept})

        # Stated shardings also make an argument's origin irrelevant: without them the first call,
        # with fresh arrays, and the second, with results of the first, would compile twice.
        in_shardings = self._divide(_shardings(arguments, placement))
        self._kept_on_mesh = None if placement is None else in_shardings[1]
        self._compiled = jax.jit(
            split_call,
            donate_argnums=0,
            in_shardings=in_shardings,
            out_shardings=_shardings(results, placement),
        )

    def _divide(self, dynamic: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        donated = {k: v for k, v in dynamic.items() if k in self._donated}
        kept = {k: v for k, v in dynamic.items() if k not in self._donated}
        return donated, kept

    def __call__(self, dynamic: dict[str, Any]) -> Any:
        before = compilations()
        try:
            donated, kept = self._divide(dynamic)
            if self._kept_on_mesh is not None:
                kept = jax.tree.map(_put_on_mesh, kept, self._kept_on_mesh)
            results = self._compiled(donated, kept)
        except RuntimeError as error:
            # Not by a look at the buffers: a program that fails has consumed them, too.
            if "has been deleted" not in str(error):
                raise
            raise FluxionError(f"expected arguments with their buffers, {CONSUMED}") from error
        self.compilations += compilations() - before
        return results

    def trace(self, dynamic: dict[str, Any]) -> Any:
        return self._compiled.trace(*self._divide(dynamic))
