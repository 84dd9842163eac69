"""Sphinx configuration."""

from pathlib import Path

import spatiaflow

project, author, copyright = "spatiaflow", "The spatiaflow developers", "2026, the spatiaflow developers"
version = release = spatiaflow.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "numpydoc",
    "sphinx_copybutton",
    "sphinxcontrib.bibtex",
]
exclude_patterns = ["_build", "inventories", "tutorials/*.py"]
html_theme = "sphinx_book_theme"
html_title = "spatiaflow"
html_theme_options = {"show_toc_level": 2}
templates_path, html_static_path = [], []
autosummary_generate = True
autodoc_typehints = "none"
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False
bibtex_bibfiles = ["references.bib"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
nb_execution_mode = "off"  # tutorials are committed executed
suppress_warnings = ["mystnb.unknown_mime_type"]

# Inventories are vendored (inventories/make.py writes them), so that the build needs no network
_inventories = Path(__file__).parent / "inventories"
intersphinx_mapping = {
    "anndata": ("https://anndata.readthedocs.io/en/stable", str(_inventories / "anndata.inv")),
    "lightning": ("https://lightning.ai/docs/pytorch/stable", str(_inventories / "lightning.inv")),
    "numpy": ("https://numpy.org/doc/stable", str(_inventories / "numpy.inv")),
    "pandas": ("https://pandas.pydata.org/docs", str(_inventories / "pandas.inv")),
    "spatialdata": ("https://spatialdata.scverse.org/en/stable", str(_inventories / "spatialdata.inv")),
    "torch": ("https://docs.pytorch.org/docs/stable", str(_inventories / "torch.inv")),
}
