"""Waiting for a compiled program in such a way that Ctrl-C works and the cache survives it.

A compiled program cannot be interrupted from Python, and while it runs nobody but it holds the
cache: an exception between its start and the moment its results are stored would lose them. So
Ctrl-C is held back that long. It raises the program's cancel word, the program stops by itself at
its next host operation, its results are stored whole and handed out, and only then the interrupt is
passed on.
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


class Held:
    """Ctrl-C that was held back; true if it was pressed."""

    def __init__(self, handler: Any) -> None:
        """Takes the handler that was in place."""
        self._handler = handler
        self._first: tuple[int, FrameType | None] | None = None

    def __bool__(self) -> bool:
        return self._first is not None

    def hold(self, number: int, frame: FrameType | None) -> None:
        """Remembers the first of any number of signals."""
        self._first = self._first or (number, frame)

    def pass_on(self) -> None:
        """Calls the handler that was in place, if anything was held back."""
        first, self._first = self._first, None
        if first is not None:
            self._handler(*first)


@contextmanager
def interrupt_held(word: int) -> Iterator[Held]:
    """Holds Ctrl-C back and cancels the program's host work on it; the caller passes it on.

    Only the main thread receives signals; elsewhere, and where Ctrl-C is switched off, this does
    nothing. A handler other than Python's own is called late too, but cancels nothing, because it
    need not mean to stop.

    Args:
      word: the cancel word that stops the program.

    Yields:
      What was held back. On an error it is passed on at once.
    """
    previous = signal.getsignal(signal.SIGINT)
    held = Held(previous)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield held
        return

    def hold(number: int, frame: FrameType | None) -> None:
        first = not held
        held.hold(number, frame)
        if first and previous is signal.default_int_handler:
            host_ops.cancel(word)

    signal.signal(signal.SIGINT, hold)
    try:
        yield held
    except BaseException:
        signal.signal(signal.SIGINT, previous)
        held.pass_on()
        raise
    signal.signal(signal.SIGINT, previous)


def wait(outputs: Any) -> None:
    """Waits until all arrays of a pytree are computed, and lets signal handlers run meanwhile."""
    arrays = jax.tree.leaves(outputs)
    while not all(x.is_ready() for x in arrays):
        time.sleep(_POLL_S)
    jax.block_until_ready(outputs)
