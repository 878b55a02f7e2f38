"""The native library: finds, loads and registers it, and controls its pool of threads.

One shared library of plain C functions and XLA FFI handlers, loaded with ctypes at first use; it
does not depend on the Python version. It is looked for at `FLUXION_HOST_LIBRARY`, else next to this
file, where CMake installs it. The process's environment is read when it is loaded:
`FLUXION_CPU_VARIANT` (scalar, avx2, avx512, avx512_vnni) forces the kernels, `FLUXION_NUM_THREADS`
sets how many threads work (by default one for each CPU, or as many as a control group's limit keeps
busy, and two less once a GPU calls),
`FLUXION_CPUS` confines the library's own threads to a list of CPUs such as `0-7,16` (threads of the
framework that collect stay where they are), `FLUXION_SPIN_US` sets for how many microseconds an
idle thread spins before it sleeps, `FLUXION_TIMEOUT_S` bounds how long a collect waits (on the CPU
backend only where collect begins the tasks: with one thread or several devices), and
`FLUXION_CUDA_SYNC` (kernel, memops, hostfunc) says how a CUDA stream calls the host: through words
in pinned memory that a kernel of ours or the driver writes and waits for, or through functions that
the driver calls, which takes longer and is the default only under CUDA_LAUNCH_BLOCKING and where
the driver offers nothing else.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax

# Has to match fluxion_interface_version() in csrc/c_api.cc.
INTERFACE_VERSION = 6
MAX_THREADS = 1024
MAX_SPIN_US = 1_000_000
TARGETS = ("fluxion_append", "fluxion_submit", "fluxion_collect", "fluxion_keep")

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
      and usable, best first), `threads` (that work; of one, the one that collects), `cpus` (how
      many this process may run on), `cpu_list` (those that the library's threads run on),
      `spin_us` (how long an idle thread spins), `in_flight` (submitted, not collected) and `cuda`
      (how a CUDA stream calls the host and copies small arrays, such as "memops, kernel"; empty
      before the first time); all but the first three are None or empty if it is not loaded.
    """
    library, path, reason = _load()
    about: dict[str, Any] = {"loaded": library is not None, "path": str(path), "reason": reason}
    if library is None:
        names = ("variant", "threads", "cpus", "cpu_list", "spin_us", "in_flight", "cuda")
        nothing = dict.fromkeys(names)
        return about | nothing | {"variants": ()}
    return about | {
        "variant": library.fluxion_variant().decode(),
        "variants": tuple(library.fluxion_variants().decode().split(",")),
        "threads": library.fluxion_threads(),
        "cpus": library.fluxion_cpus(),
        "cpu_list": library.fluxion_cpu_list().decode(),
        "spin_us": library.fluxion_spin_us(),
        "in_flight": library.fluxion_slots_in_flight(),
        "cuda": library.fluxion_cuda().decode(),
    }


def set_threads(threads: int) -> None:
    """Sets how many threads share the work.

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


@contextmanager
def awake() -> Iterator[None]:
    """Within it, idle threads spin for 2 ms before they sleep, as they do where a GPU calls them.

    Otherwise it is 50 us. A time that `FLUXION_SPIN_US` has chosen stays.
    """
    library = _require()
    changed = library.fluxion_stay_awake(1)
    try:
        yield
    finally:
        if changed:
            library.fluxion_stay_awake(0)


def spread(address: int, num_bytes: int) -> int:
    """Lays memory on all memory nodes of the machine in turn, whatever it holds.

    Returns:
      On how many nodes it lies; 1 if there is but one or the system refused.
    """
    return int(_require().fluxion_spread(address, num_bytes))


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
        for platform in ("cpu", "CUDA"):
            handler = getattr(library, f"{target}_{platform.lower()}")
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform=platform)
    # Before JAX lets go of its arrays: handlers run last in, first out.
    atexit.register(library.fluxion_drain)
    return _Loaded(library, path, None)


def _declare(library: ctypes.CDLL) -> None:
    for name in ("variant", "variants", "variant_problem", "cpu_list", "cuda"):
        getattr(library, f"fluxion_{name}").restype = ctypes.c_char_p
    for name in ("interface_version", "threads", "cpus", "spin_us", "slots_in_flight", "drain"):
        getattr(library, f"fluxion_{name}").restype = ctypes.c_int32
    for name in ("set_threads", "stay_awake", "cancel", "release_cancel_word"):
        getattr(library, f"fluxion_{name}").argtypes = [ctypes.c_int32]
    library.fluxion_spread.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.fluxion_spread.restype = ctypes.c_int32
    for name in ("append", "collect"):
        inject = getattr(library, f"fluxion_inject_{name}_fault")
        inject.argtypes = [ctypes.c_int32, ctypes.c_int64]


def _environment_problem() -> str | None:
    """What is wrong with the environment variables; the library itself would use its defaults."""
    return (
        _number_problem("FLUXION_NUM_THREADS", 1, MAX_THREADS, "use what the process may use")
        or _number_problem("FLUXION_SPIN_US", 0, MAX_SPIN_US, "spin for the default of 50")
        or _cpus_problem(os.environ.get("FLUXION_CPUS", ""))
        or _timeout_problem(os.environ.get("FLUXION_TIMEOUT_S", ""))
        or _cuda_sync_problem(os.environ.get("FLUXION_CUDA_SYNC", ""))
    )


def _number_problem(name: str, low: int, high: int, otherwise: str) -> str | None:
    text = os.environ.get(name, "")
    if not text or (text.isascii() and text.isdecimal() and low <= int(text) <= high):
        return None
    return (
        f"expected {name} to be a number from {low} to {high}, got {text!r}; "
        f"unset it to {otherwise}"
    )


def _cpus_problem(text: str) -> str | None:
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,5}(-[0-9]{1,5})?(,[0-9]{1,5}(-[0-9]{1,5})?)*", text):
        return (
            f"expected FLUXION_CPUS to be a list of CPUs such as '0-3,8', got {text!r}; "
            "unset it to use all allowed CPUs"
        )
    wanted: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        wanted.update(range(int(first), int(last or first) + 1))
        if int(last or first) < int(first):
            return (
                f"expected ranges of FLUXION_CPUS to ascend, got {part!r}; write '{last}-{first}'"
            )
    allowed = os.sched_getaffinity(0)
    if not wanted <= allowed:
        return (
            f"expected FLUXION_CPUS to name CPUs out of {sorted(allowed)}, which this process may "
            f"run on, got {text!r}; leave out {sorted(wanted - allowed)}"
        )
    return None


def _cuda_sync_problem(text: str) -> str | None:
    if text in ("", "memops", "kernel", "hostfunc"):
        return None
    return (
        f"expected FLUXION_CUDA_SYNC to be 'memops', 'kernel' or 'hostfunc', got {text!r}; "
        "unset it for the faster one that works"
    )


def _timeout_problem(text: str) -> str | None:
    try:
        valid = not text or 0 < float(text) < 1e9
    except ValueError:
        valid = False
    if valid:
        return None
    return (
        f"expected FLUXION_TIMEOUT_S to be a positive number of seconds, got {text!r}; "
        "unset it for the default of 300"
    )
