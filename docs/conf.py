"""Sphinx's configuration. `make docs` builds the book into build/docs and treats warnings as errors."""

from __future__ import annotations

import sys
from pathlib import Path

import pissa

sys.path.append(str(Path(__file__).parent))  # for book.py

project = "pissa"
author = "the authors of pissa"
copyright = "2026, the authors of pissa"
version = release = pissa.__version__

extensions = ["myst_parser", "breathe", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "book"]
myst_heading_anchors = 3  # every heading can be linked to, and links to headings are checked
nitpicky = True  # warn about references that cannot be resolved

# Names without a page here. `make docs` does not use the network, so it does not read other projects' inventories.
nitpick_ignore_regex = [
    ("py:class", r"Tensor|(torch|peft|os|collections\.abc|dataclasses)\..+"),
    ("cpp:identifier", "pissa(::cpu|::cuda)?"),  # namespaces that Breathe refers to but does not describe
    ("cpp:identifier", "(cuda|cublas|cusolver)[A-Za-z]+_t"),  # CUDA's types
]

breathe_projects = {"pissa": "../build/doxygen/xml"}  # by docs/Doxyfile
breathe_default_project = "pissa"
breathe_show_include = False  # users include only one header

default_role = "literal"  # in docstrings, single backticks are code
smartquotes_action = "D"  # only dashes, so that quotes in examples can be copied

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"

html_theme = "furo"
html_title = "pissa"
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["tables.css"]
templates_path: list[str] = []

# The source is the repository, so that a relative link leads to the same page here and on GitHub.
root_doc = "docs/index"
include_patterns = [
    "docs/**/*.md",
    "docs/*.md",
    "CONTRIBUTING.md",
    "bench/speed.md",
    "bench/situations.md",
    "bench/recipes/README.md",
    "bench/experiments/README.md",
    "bench/experiments/PROTOCOL.md",
]
exclude_patterns = [
    "docs/pypi.md",  # written for the package index
    *(".*", "build", "cpp", "python", "tests", "examples", "bench/results"),  # not searched
]
