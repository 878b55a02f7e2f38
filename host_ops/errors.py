"""The error of an implementation that cannot be used here."""

from __future__ import annotations


class UnavailableError(NotImplementedError):
    """An implementation was asked for by name and cannot be used; the message says why."""
