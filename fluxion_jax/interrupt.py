"""Waiting for a compiled program in such a way that Ctrl-C works and the cache survives it.

A compiled program cannot be interrupted from Python, and while it runs nobody but it holds the
cache: an exception between its start and the moment its results are stored would lose them. So
Ctrl-C is held back that long. It raises the program's cancel word, the program stops by itself at
its next host operation, its results are stored whole, and only then the interrupt is passed on.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jax

import host_ops

# Short against a decode step, long enough to cost nothing.
_POLL_S = 0.0005


@contextmanager
def cancel_word() -> Iterator[int]:
    """Yields the id of a cancel word and releases it afterwards."""
    word = host_ops.new_cancel_word()
    try:
        yield word
    finally:
        host_ops.release_cancel_word(word)


@contextmanager
def interrupt_held(word: int) -> Iterator[list[Any]]:
    """Holds Ctrl-C back, cancels the program's host work on it, and passes it on at the end.

    Only the main thread receives signals; elsewhere, and where Ctrl-C is switched off, this does
    nothing. A handler other than Python's own is called late too, but cancels nothing, because it
    need not mean to stop.

    Args:
      word: the cancel word that stops the program.

    Yields:
      A list, empty as long as nothing was held back.
    """
    held: list[Any] = []
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield held
        return

    def hold(number: int, frame: FrameType | None) -> None:
        first = not held
        held.append((number, frame))
        if first and previous is signal.default_int_handler:
            host_ops.cancel(word)

    signal.signal(signal.SIGINT, hold)
    try:
        yield held
    finally:
        signal.signal(signal.SIGINT, previous)
        if held:
            previous(*held[0])


def wait(outputs: Any) -> None:
    """Waits until all arrays of a pytree are computed, and lets signal handlers run meanwhile."""
    arrays = jax.tree.leaves(outputs)
    while not all(x.is_ready() for x in arrays):
        time.sleep(_POLL_S)
    jax.block_until_ready(outputs)
