"""The native library: finds, loads and registers it, and controls its pool of threads.

One shared library of plain C functions and XLA FFI handlers, loaded with ctypes at first use; it
does not depend on the Python version. It is looked for at `FLUXION_HOST_LIBRARY`, else next to
this file, where CMake installs it. The process's environment is read when it is loaded:
`FLUXION_CPU_VARIANT` (scalar, avx2, avx512) forces the kernels, `FLUXION_NUM_THREADS` sets how
many threads work including the one that collects, `FLUXION_TIMEOUT_S` bounds how long a collect
waits.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
from pathlib import Path
from typing import Any, NamedTuple

import jax

# Has to match fluxion_interface_version() in csrc/c_api.cc.
INTERFACE_VERSION = 2
MAX_THREADS = 1024
TARGETS = ("fluxion_append", "fluxion_submit", "fluxion_start", "fluxion_collect")

_lock = threading.Lock()
_loaded: _Loaded | None = None


class _Loaded(NamedTuple):
    library: ctypes.CDLL | None
    path: Path
    reason: str | None


def is_available() -> bool:
    """Whether the native library can be used; loads it if that has not been tried yet."""
    return _load().reason is None


def unavailable_reason() -> str | None:
    """Why the native library cannot be used, or None if it can."""
    return _load().reason


def info() -> dict[str, Any]:
    """Describes the native library.

    Returns:
      `loaded` (bool), `path`, `reason` (None if loaded), `variant` and `variants` (kernels in use
      and usable, best first), `threads` (including the one that collects), `cpus` (this process
      may run on) and `in_flight` (submitted, not collected); the last five are None or empty if
      it is not loaded.
    """
    library, path, reason = _load()
    about: dict[str, Any] = {"loaded": library is not None, "path": str(path), "reason": reason}
    if library is None:
        nothing = dict.fromkeys(("variant", "threads", "cpus", "in_flight"))
        return about | nothing | {"variants": ()}
    return about | {
        "variant": library.fluxion_variant().decode(),
        "variants": tuple(library.fluxion_variants().decode().split(",")),
        "threads": library.fluxion_threads(),
        "cpus": library.fluxion_cpus(),
        "in_flight": library.fluxion_slots_in_flight(),
    }


def set_threads(threads: int) -> None:
    """Sets how many threads share the work, including the one that collects.

    Args:
      threads: 1 to 1024; 1 means that only the collecting thread works. The default is the number
        of CPUs that the process may use. Results do not depend on it.

    Raises:
      ValueError: if it is out of range.
    """
    if not 1 <= threads <= MAX_THREADS:
        raise ValueError(
            f"threads: expected 1 to {MAX_THREADS}, got {threads}; "
            "use at most one per CPU that the process may run on"
        )
    _require().fluxion_set_threads(threads)


def drain() -> int:
    """Waits until no submitted work is queued or running.

    To be called after a program failed between submit and collect, and before its cache goes.

    Returns:
      How many requests were found that nobody had collected; their slots are given up.
    """
    return int(_require().fluxion_drain())


def new_cancel_word() -> int:
    """Returns the id of a new cancel word, for `Work.cancel`."""
    return int(_require().fluxion_new_cancel_word())


def cancel(word: int) -> None:
    """Makes work submitted under this cancel word end early, now and from now on.

    Raises:
      ValueError: if there is no such cancel word.
    """
    if not _require().fluxion_cancel(word):
        raise ValueError(
            f"expected the id of a live cancel word, got {word}; take one from new_cancel_word()"
        )


def release_cancel_word(word: int) -> None:
    """Gives a cancel word back; work still running under it keeps it alive."""
    _require().fluxion_release_cancel_word(word)


def inject_fault(status: int, after_calls: int = 0, *, operation: str = "collect") -> None:
    """Makes one later call report `status` and write nothing: a seam for tests.

    Args:
      status: `STATUS_*` bits; 0 takes a pending fault back.
      after_calls: how many calls of the operation still succeed before it.
      operation: "collect" or "append".
    """
    getattr(_require(), f"fluxion_inject_{operation}_fault")(status, after_calls)


def require() -> None:
    """Loads the library and registers its FFI targets.

    Raises:
      RuntimeError: if it cannot be used, with the reason.
    """
    _require()


def library_path() -> Path:
    """Where the native library is looked for."""
    forced = os.environ.get("FLUXION_HOST_LIBRARY")
    return Path(forced) if forced else Path(__file__).parent / "_native" / "libfluxion_host.so"


def _require() -> ctypes.CDLL:
    library, path, reason = _load()
    if library is None:
        raise RuntimeError(f"expected the native library at {path}, got none: {reason}")
    return library


def _load() -> _Loaded:
    global _loaded
    with _lock:
        if _loaded is None:
            _loaded = _open(library_path())
        return _loaded


def _open(path: Path) -> _Loaded:
    if problem := _environment_problem():
        return _Loaded(None, path, problem)
    if not path.is_file():
        return _Loaded(
            None,
            path,
            f"expected the native library at {path}, got no such file; install a wheel, or build "
            "it as host_ops/csrc/README.md says",
        )
    try:
        library = ctypes.CDLL(str(path))
        _declare(library)
    except (OSError, AttributeError) as error:
        return _Loaded(
            None, path, f"expected a library that loads, got {error}; build it for this system"
        )
    if (version := library.fluxion_interface_version()) != INTERFACE_VERSION:
        return _Loaded(
            None,
            path,
            f"expected interface version {INTERFACE_VERSION}, got {version} from {path}; "
            "build the library from the same sources as the package",
        )
    if problem := library.fluxion_variant_problem().decode():
        return _Loaded(None, path, problem)
    for target in TARGETS:
        handler = getattr(library, f"{target}_cpu")
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform="cpu")
    # Before JAX lets go of its arrays: handlers run last in, first out.
    atexit.register(library.fluxion_drain)
    return _Loaded(library, path, None)


def _declare(library: ctypes.CDLL) -> None:
    for name in ("variant", "variants", "variant_problem"):
        getattr(library, f"fluxion_{name}").restype = ctypes.c_char_p
    for name in ("interface_version", "threads", "cpus", "slots_in_flight", "drain"):
        getattr(library, f"fluxion_{name}").restype = ctypes.c_int32
    for name in ("set_threads", "cancel", "release_cancel_word"):
        getattr(library, f"fluxion_{name}").argtypes = [ctypes.c_int32]
    for name in ("append", "collect"):
        inject = getattr(library, f"fluxion_inject_{name}_fault")
        inject.argtypes = [ctypes.c_int32, ctypes.c_int64]


def _environment_problem() -> str | None:
    """What is wrong with the environment variables; the library itself would use its defaults."""
    threads = os.environ.get("FLUXION_NUM_THREADS", "")
    if threads and not (threads.isdecimal() and 1 <= int(threads) <= MAX_THREADS):
        return (
            f"expected FLUXION_NUM_THREADS to be a number from 1 to {MAX_THREADS}, "
            f"got {threads!r}; unset it to use all allowed CPUs"
        )
    timeout_s = os.environ.get("FLUXION_TIMEOUT_S", "")
    try:
        valid = not timeout_s or 0 < float(timeout_s) < 1e9
    except ValueError:
        valid = False
    if not valid:
        return (
            f"expected FLUXION_TIMEOUT_S to be a positive number of seconds, got {timeout_s!r}; "
            "unset it for the default of 300"
        )
    return None
