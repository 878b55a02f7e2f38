"""Files that are whole or not there, whoever writes them and whenever the writer dies."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replaced(target: Path) -> Iterator[BinaryIO]:
    """Yields a new file that takes the place of `target` once it is complete and on the disk.

    Several processes may write the same file at once: each has a partial file of its own, and the
    one that is done last stays. A process that is killed leaves its partial file behind.

    Args:
      target: what is written; its folder must exist.

    Raises:
      OSError: the file cannot be written; what was there before stays.
    """
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        # Only now does the new name outlive a power cut, too.
        os.fsync(folder)
    finally:
        os.close(folder)
