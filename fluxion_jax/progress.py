"""Progress bars: where somebody watches, and only as lively as the place can show."""

from __future__ import annotations

import sys
from typing import Any

# In a notebook what is printed stays: a bar comes late and seldom moves.
_NOTEBOOK_DELAY_S = 20.0
_NOTEBOOK_INTERVAL_S = 2.0


def bar_options(progress: bool | None) -> dict[str, Any]:
    """How `tqdm` shows progress.

    Args:
      progress: show it; None shows it on a terminal, and plainly in a notebook. There a generation
        has a bar only if it takes long.

    Returns:
      Options of `tqdm`.
    """
    if progress is not None:
        return {"disable": not progress}
    # A kernel's stream is no terminal, but somebody reads it.
    if type(sys.stderr).__module__.partition(".")[0] == "ipykernel":
        return {"delay": _NOTEBOOK_DELAY_S, "mininterval": _NOTEBOOK_INTERVAL_S, "ascii": True}
    return {"disable": not sys.stderr.isatty()}
