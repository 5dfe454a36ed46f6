"""How Sphinx builds the pages: Markdown by MyST, docstrings by autodoc; `make docs` takes warnings for errors."""

import compressor

project = "compressor"
author = "the compressor developers"
version = release = compressor.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
myst_heading_anchors = 3
exclude_patterns = ["requirements.txt"]
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
# the source of one page stands beside the studies; its own links are relative to that folder
suppress_warnings = ["myst.xref_missing"]

html_theme = "furo"
html_title = "compressor"
html_show_copyright = False
