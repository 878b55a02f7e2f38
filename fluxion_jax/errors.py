"""The exceptions this library raises on purpose; each message says expected, got and what to do."""

from __future__ import annotations

import contextlib
import math
import numbers
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

import host_ops
import pallas_kernels


class FluxionError(Exception):
    """Base class of every error this library raises on purpose.

    Attributes:
      partial: what was generated before the error came, a `Result`, or None.

    Example:
      >>> import fluxion_jax as fx
      >>> try:
      ...     fx.fixed(17, 0.05)
      ... except fx.FluxionError as error:
      ...     print(error)
      expected a granularity of (16, 32, 64, 128) tokens, got 17
    """

    partial: Any = None


class ConfigError(FluxionError, ValueError):
    """An argument or a configuration value is outside its domain.

    Example:
      >>> import fluxion_jax as fx
      >>> fx.top_p(1.5)
      Traceback (most recent call last):
      ...
      fluxion_jax.errors.ConfigError: expected top-p in (0, 1], got 1.5
    """


class CacheFullError(FluxionError):
    """A sequence would grow beyond the `max_tokens` its cache was allocated for.

    Example:
      >>> import fluxion_jax as fx
      >>> cache = fx.HostKV.allocate(fx.KVLayout(1, 1, 64), batch=1, max_tokens=512)
      >>> try:
      ...     cache.require_room(513)
      ... except fx.CacheFullError as error:
      ...     print(str(error)[:64])
      expected at most max_tokens=512 tokens in a sequence, got 513 in
    """


class UnsupportedError(FluxionError, NotImplementedError):
    """A feature that is refused by name, because ignoring it would change results.

    Example:
      >>> import fluxion_jax as fx
      >>> from fluxion_jax.models import ModelConfig
      >>> try:
      ...     ModelConfig.from_hf({"model_type": "mamba"})
      ... except fx.UnsupportedError as error:
      ...     print(type(error).__name__)
      UnsupportedError
    """


class IntegrityError(FluxionError):
    """A file is truncated, incomplete, or not what its name or header says.

    Example:
      >>> import fluxion_jax as fx, pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "cache.kv"
      >>> _ = path.write_bytes(b"something else")
      >>> try:
      ...     fx.HostKV.load(path)
      ... except fx.IntegrityError as error:
      ...     print(str(error)[:39])
      expected a file that HostKV.save wrote,
    """


def require(name: str, value: Any, kind: type, remedy: str) -> None:
    """Raises ConfigError unless a value is of a kind."""
    if not isinstance(value, kind):
        raise ConfigError(
            f"expected a {kind.__name__} as {name}, got {type(value).__name__}; {remedy}"
        )


def require_integer(name: str, value: Any, *, least: int = 1) -> None:
    """Raises ConfigError unless a value is an integer of at least `least` that int32 holds."""
    known = isinstance(value, int | np.integer) and not isinstance(value, bool | np.bool_)
    if not known or value < least:
        raise ConfigError(f"expected an integer {name} >= {least}, got {value!r}")
    if value > np.iinfo(np.int32).max:
        raise ConfigError(f"expected an integer {name} below 2**31, got {value}")


def require_number(name: str, value: Any, remedy: str) -> None:
    """Raises ConfigError unless a value is one finite real number."""
    known = isinstance(value, numbers.Real | np.number) or getattr(value, "shape", None) == ()
    try:
        good = known and math.isfinite(value)
    except TypeError:
        good = False
    if not good:
        raise ConfigError(f"expected {name}, a finite number, got {value!r}; {remedy}")


def is_iterable(value: Any) -> bool:
    """Whether a value can be iterated over; an array without axes only claims it."""
    return isinstance(value, Iterable) and getattr(value, "ndim", 1) > 0


def is_one_of(value: Any, known: Iterable[str]) -> bool:
    """Whether a value is one of some words; it may be anything, an array too."""
    return isinstance(value, str) and value in known


def require_path(value: Any, what: str) -> None:
    """Raises ConfigError unless a value can name a file."""
    if not isinstance(value, str | os.PathLike):
        raise ConfigError(f"expected the path of {what}, got {type(value).__name__}; pass a string")


@contextlib.contextmanager
def refused_by_name() -> Iterator[None]:
    """Turns a leaf package's refusal of an implementation into this package's error.

    The leaves cannot know `UnsupportedError`, for they never import the package that uses them.

    Raises:
      UnsupportedError: an implementation that was asked for cannot be used here.
    """
    try:
        yield
    except (
        host_ops.UnavailableError,
        pallas_kernels.UnsupportedImplementationError,
    ) as error:
        raise UnsupportedError(str(error)) from error
