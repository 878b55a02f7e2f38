"""Import of optional packages, with an error that says what to install."""

from __future__ import annotations

import importlib
from typing import Any

from fluxion_jax.errors import FluxionError


def import_extra(package: str) -> Any:
    """Imports a package of the `models` extra when it is first needed.

    Raises:
      FluxionError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise FluxionError(
            f"expected the package {package!r} for reading model files, got none; "
            "run: pip install 'fluxion-jax[models]'"
        ) from error
