"""The exceptions this library raises on purpose; each message says expected, got and what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import host_ops
import pallas_kernels


class FluxionError(Exception):
    """Base class of every error this library raises on purpose.

    Attributes:
      partial: what was generated before the error came, a `Result`, or None.
    """

    partial: Any = None


class ConfigError(FluxionError, ValueError):
    """An argument or a configuration value is outside its domain."""


class CacheFullError(FluxionError):
    """A sequence would grow beyond the `max_tokens` its cache was allocated for."""


class UnsupportedError(FluxionError, NotImplementedError):
    """A feature that is refused by name, because ignoring it would change results."""


class IntegrityError(FluxionError):
    """A file is truncated, incomplete, or not what its name or header says."""


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
