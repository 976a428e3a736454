"""The documentation: Markdown by MyST, the reference from docstrings, tables from the program."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "cli"), str(Path(__file__).parent / "extensions")]

import adapterkit  # noqa: E402

project = "adapterkit"
author = "the authors of adapterkit"
copyright = author  # noqa: A001
release = version = adapterkit.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "adapterkit_tables"]
exclude_patterns = ["extensions"]
html_theme = "furo"
html_title = f"adapterkit {release}"
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
autodoc_typehints = "none"  # signatures have them
autodoc_member_order = "bysource"
napoleon_use_ivar = True
napoleon_google_docstring, napoleon_numpy_docstring = True, False
# Terminal sessions hold what programs print, which no lexer knows whole; `bytes` is a field too.
suppress_warnings = ["misc.highlighting_failure", "ref.python"]
html_show_sourcelink = False
