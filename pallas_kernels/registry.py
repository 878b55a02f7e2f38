"""Choice of an implementation: `implementation=None | name | sequence of names`.

`None` takes the best that works here, a name is used or raises, a sequence is tried in order; if
nothing is left, the error lists every reason. An implementation declines work by raising
`UnsupportedImplementationError`, which always happens while tracing, never on the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from pallas_kernels.compat import silence_triton_deprecation, target_platform

Implementation = str | Sequence[str] | None


class UnsupportedImplementationError(NotImplementedError):
    """An implementation cannot do what was asked; the text says why and what to do."""


def require_gpu(interpret: bool = False, advice: str = "use 'xla'") -> None:
    """Declines the work of a kernel where it cannot run.

    Args:
      interpret: whether the kernel is interpreted, which any platform can do.
      advice: what to do instead.

    Raises:
      UnsupportedImplementationError: the program that is traced is not for a GPU.
    """
    if not interpret and target_platform() != "gpu":
        raise UnsupportedImplementationError(
            f"expected a CUDA device, got platform {target_platform()!r}; {advice}"
        )


def dispatch(
    op: str,
    implementation: Implementation,
    candidates: Mapping[str, Callable[..., Any]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls the chosen implementation of an op.

    Args:
      op: name of the op, for error texts.
      implementation: `None`, a name, or a sequence of names.
      candidates: implementations by name, best first; each raises
        `UnsupportedImplementationError` if it cannot do the work.
      *args: passed on, arrays.
      **kwargs: passed on, constants.

    Returns:
      What the implementation returns.

    Raises:
      ValueError: if a name is unknown, or the sequence is empty.
      UnsupportedImplementationError: if nothing of what was asked for works; it carries every
        reason.
    """
    names = _names(op, implementation, candidates)
    reasons: list[str] = []
    for name in names:
        candidate = candidates[name]
        if name != "xla":
            candidate = _traced_candidate(candidate, tuple(kwargs))
        try:
            return candidate(*args, **kwargs)
        except UnsupportedImplementationError as error:
            reasons.append(f"{name}: {error}")
    raise UnsupportedImplementationError(
        f"expected an implementation of {op} that works here, got {implementation!r}, of which "
        f"none does; pass implementation=None or remove the obstacle: " + "; ".join(reasons)
    )


def traced_once(function: Callable[..., Any], constants: Sequence[str]) -> Callable[..., Any]:
    """A function as a part of programs that is traced and lowered once for all layers.

    Lowering a kernel takes Python a tenth of a second, which a model of 32 layers would pay for
    each kernel of each layer.

    Args:
      function: of arrays, and of constants that it takes by name.
      constants: their names.
    """
    traced = jax.jit(function, static_argnames=tuple(constants))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # Here, because it is lowered anew for each program even if it is not traced again.
        silence_triton_deprecation()
        return traced(*args, **kwargs)

    return call


_traced_candidate = functools.cache(traced_once)


def _names(
    op: str, implementation: Implementation, candidates: Mapping[str, Callable[..., Any]]
) -> tuple[str, ...]:
    if implementation is None:
        # Elsewhere than on a GPU the kernels could only be interpreted, which nobody wants by
        # default.
        return tuple(candidates) if target_platform() == "gpu" else ("xla",)
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    unknown = [name for name in names if name not in candidates]
    if unknown or not names:
        raise ValueError(
            f"expected implementation of {op} to be None or out of {sorted(candidates)}, got "
            f"{implementation!r}; correct the name"
        )
    return names
