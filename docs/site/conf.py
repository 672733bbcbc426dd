"""Settings of the documentation site: `make docs` builds it with Sphinx.

The repository itself is the source, so that a link between two files leads to the same place on the
site, on GitHub and on the disk. Nothing is fetched, and the built pages ask no other host for
anything: no intersphinx, no fonts, no MathJax.
"""

import sys
from pathlib import Path

from sphinx.application import Sphinx

import alignlab

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))

from docstrings import as_rst  # noqa: E402
from site_pages import filled  # noqa: E402

project = "alignlab"
author = "alignlab authors"
version = release = alignlab.__version__
html_title = f"alignlab {release}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
root_doc = "docs/index"
source_suffix = {".md": "markdown"}
include_patterns = [
    "docs/*.md",
    "docs/api/*.md",
    "CONTRIBUTING.md",
    "losses/README.md",
    "kernels/README.md",
    "experiments/results/**/report.md",
    "experiments/results/findings/left_out.md",
    "experiments/results/control_ten_seeds/subsets.md",
]
# Written to be part of another page, and so without a title of their own.
TITLES = {
    "experiments/results/findings/left_out": "Claims left out",
    "experiments/results/control_ten_seeds/subsets": "What fewer seeds would have claimed",
}
SOURCES = ("docs", "CONTRIBUTING.md", "losses", "kernels", "experiments")
exclude_patterns = [path.name for path in ROOT.iterdir() if path.name not in SOURCES]

myst_enable_extensions = ["attrs_block", "attrs_inline", "deflist"]
myst_heading_anchors = 5
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"
copybutton_exclude = ".linenos, .gp"

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_theme_options = {
    "navigation_with_keys": True,
    "light_css_variables": {
        "color-brand-primary": "#1f5f99",
        "color-brand-content": "#1f5f99",
    },
    "dark_css_variables": {
        "color-brand-primary": "#7fb8ea",
        "color-brand-content": "#7fb8ea",
    },
}


def fill_page(app: Sphinx, page: str, source: list[str]) -> None:
    """Puts what is made of the code where a page asks for it."""
    title = f"# {TITLES[page]}\n\n" if page in TITLES else ""
    source[0] = title + filled(source[0])


def convert_docstring(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Docstrings are Markdown."""
    lines[:] = as_rst(lines, is_value=what in ("attribute", "data", "property"))


def lead_to_start(app: Sphinx, error: Exception | None) -> None:
    """The site's folder opens at its start page."""
    page = f"{app.config.root_doc}.html"
    to_start = f'<meta http-equiv="refresh" content="0; url={page}">'
    Path(app.outdir, "index.html").write_text(
        f'<!doctype html><title>alignlab</title>{to_start}<a href="{page}">alignlab</a>\n'
    )


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", fill_page)
    app.connect("autodoc-process-docstring", convert_docstring, priority=400)  # before napoleon
    app.connect("build-finished", lead_to_start)
