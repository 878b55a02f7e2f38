"""What reaches host work and host memory from outside the program.

Cancel words, drain, the place of a fresh cache, and faults for tests.
"""

from __future__ import annotations

import itertools
import threading
from types import ModuleType

import jax

from host_ops.errors import UnavailableError
from host_ops.types import STATUS_OK

_lock = threading.Lock()
_ids = itertools.count(1)
_cancelled: dict[int, bool] = {}
_OPERATIONS = ("append", "collect")
_faults: dict[str, tuple[int, int]] = {}


def _native() -> ModuleType | None:
    """The native library if it can be used; imported late, because loading it is work."""
    from host_ops import native

    return native if native.is_available() else None


def drain() -> None:
    """Waits until no host work is queued or running; only the native pool can have any."""
    if library := _native():
        library.drain()


def spread(x: jax.Array) -> None:
    """Lays a host array on all memory nodes of the machine in turn, where there are several.

    Any thread may read any block. Pages that XLA touched from one node would all lie there, and
    the threads of the other nodes would read them over the link. For arrays just allocated: what
    they hold already is moved. Does nothing without the native library.

    Args:
      x: any array on one device, in host memory.
    """
    if x.nbytes and (library := _native()):
        library.spread(x.unsafe_buffer_pointer(), x.nbytes)


def new_cancel_word() -> int:
    """Returns the id of a new cancel word, for `Work.cancel`; release it after use."""
    library = _native()
    with _lock:
        word = int(library.new_cancel_word()) if library else next(_ids)
        _cancelled[word] = False
    return word


def cancel(word: int) -> None:
    """Makes every `collect` that names this cancel word end early with `STATUS_CANCELLED`.

    The XLA tier cannot look at it, and stops only between compiled calls.

    Raises:
      ValueError: if the id is not that of a live cancel word.
    """
    with _lock:
        if word not in _cancelled:
            raise ValueError(
                f"expected the id of a live cancel word, got {word}; "
                "take one from new_cancel_word() and use it before release_cancel_word()"
            )
        _cancelled[word] = True
    if library := _native():
        library.cancel(word)


def release_cancel_word(word: int) -> None:
    """Gives a cancel word back; its id may be handed out again."""
    with _lock:
        known = _cancelled.pop(word, None) is not None
    library = _native()
    if known and library:
        library.release_cancel_word(word)


def is_cancelled(word: int) -> bool:
    """Whether a cancel word has been cancelled; false for 0 and for ids never handed out."""
    return _cancelled.get(word, False)


def inject_fault(
    status: int,
    after_calls: int = 0,
    *,
    operation: str = "collect",
    implementation: str = "native",
) -> None:
    """Makes one later call report `status` and write nothing: a seam for tests of error handling.

    Args:
      status: `STATUS_*` bits; `STATUS_OK` takes a pending fault back.
      after_calls: how many calls of the operation still succeed before it.
      operation: "collect" or "append".
      implementation: "native" or "numpy"; the XLA tier has no state that could hold a fault.

    Raises:
      ValueError: if there is no such operation.
      UnavailableError: if the implementation cannot be used or cannot be made to fail.
    """
    if operation not in _OPERATIONS:
        raise ValueError(
            f"operation: expected one of {list(_OPERATIONS)}, got {operation!r}; "
            "a submit that fails is reported by its collect"
        )
    library = _native()
    if implementation == "native" and library is not None:
        library.inject_fault(status, after_calls, operation=operation)
    elif implementation == "numpy":
        with _lock:
            _faults[operation] = (status, after_calls)
    else:
        raise UnavailableError(
            f"expected an implementation that can be made to fail, got {implementation!r}; "
            "build the native library, or use 'numpy'"
        )


def take_fault(operation: str) -> int:
    """The status that the current call of an operation of a Python tier has to report."""
    with _lock:
        status, left = _faults.pop(operation, (STATUS_OK, 0))
        if left:
            _faults[operation] = (status, left - 1)
            return STATUS_OK
        return status
