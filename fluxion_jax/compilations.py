"""Counting compilations: so that tests and statistics can tell compiling from running."""

from __future__ import annotations

import functools
import threading

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
_counts = threading.local()


@functools.cache
def _listen() -> None:
    def count(event: str, duration_secs: float, **_: str | int) -> None:
        del duration_secs
        if event == _EVENT:
            _counts.value = getattr(_counts, "value", 0) + 1

    jax.monitoring.register_event_duration_secs_listener(count)


def compilations() -> int:
    """Programs that XLA has compiled in this thread since the first call of this function."""
    _listen()
    return getattr(_counts, "value", 0)
