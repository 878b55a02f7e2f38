"""Configuration of Sphinx: `make docs` builds the pages and fails on a warning."""

import importlib.metadata

project = "fluxion_jax"
author = "The fluxion_jax authors"
try:
    release = importlib.metadata.version("fluxion-jax")
except importlib.metadata.PackageNotFoundError:
    release = "unknown"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "alabaster"
html_theme_options = {"description": "Long contexts with the KV cache in host memory"}

autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = True
myst_heading_anchors = 3
