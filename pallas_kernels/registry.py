"""Choice of an implementation: `implementation=None | name | sequence of names`.

`None` takes the best that works here, a name is used or raises, a sequence is tried in order; if
nothing is left, the error lists every reason. An implementation declines work by raising
`UnsupportedImplementationError`, which always happens while tracing, never on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pallas_kernels.compat import target_platform

Implementation = str | Sequence[str] | None


class UnsupportedImplementationError(NotImplementedError):
    """An implementation cannot do what was asked; the text says why and what to do."""


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
      *args: passed on.
      **kwargs: passed on.

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
        try:
            return candidates[name](*args, **kwargs)
        except UnsupportedImplementationError as error:
            reasons.append(f"{name}: {error}")
    raise UnsupportedImplementationError(
        f"expected an implementation of {op} that works here, got {implementation!r}, of which "
        f"none does; pass implementation=None or remove the obstacle: " + "; ".join(reasons)
    )


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
