"""Sphinx: the Markdown pages, and the API reference from the docstrings. ``make docs``."""

import fastnlcg

project = "fastnlcg"
author = "The fastnlcg authors"
version = release = fastnlcg.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"fastnlcg {release}"
exclude_patterns = ["_build"]
autodoc_typehints = "none"  # the docstrings say the types
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
suppress_warnings = ["myst.xref_missing"]  # links to files of the repository; tests/test_docs.py checks them
