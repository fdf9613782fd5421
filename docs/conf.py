"""Sphinx: `make docs` builds these pages from the files here and the package's docstrings."""

import fastfusion

project = "fastfusion"
author = "The fastfusion authors"
copyright = author
version = release = fastfusion.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["build"]
myst_enable_extensions = ["colon_fence", "attrs_block"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "fastfusion"
html_show_copyright = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
# Names in single backquotes are code: docstrings name arguments and other functions so.
default_role = "code"
napoleon_google_docstring = True
napoleon_use_rtype = False
napoleon_use_ivar = True
# A build fails on any warning; nothing is fetched, so links to other projects' docs are plain.
nitpicky = False
