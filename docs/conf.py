"""Sphinx's settings for the site. `make site` copies what it shows into build/site-source first (docs/build.py)."""

import os
import re

project = "Adversarial faces"
author = "the faceadv authors"
extensions = [
    *("myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx-mathjax-offline"),
]
exclude_patterns = ["README.md"]
html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["_static"]
html_context = {"default_mode": "auto"}
html_css_files = ["custom.css"]
html_show_sourcelink = False
html_copy_source = True
html_sidebars = {"**": ["navbar-logo.html", "sbt-sidebar-nav.html"]}  # one search box: the one above each page
html_theme_options = {
    "show_navbar_depth": 1,
    "use_download_button": True,
    "home_page_in_toc": True,
    "footer_content_items": ["extra-footer.html"],
    "extra_footer": (
        "Adversarial faces. MIT licence for code and text; data and weights of others have their own. "
        "Use attacks and cloaks on photos of yourself, of people who agreed, or on published research data."
    ),
}
# where the repository lies, for the buttons of Colab and Binder: FACEADV_REPOSITORY=https://github.com/NAME/REPOSITORY
repository = os.environ.get("FACEADV_REPOSITORY")
if repository:
    html_theme_options |= {
        "repository_url": repository,
        "repository_branch": "main",
        "path_to_docs": ".",
        "use_repository_button": True,
        "launch_buttons": {
            "binderhub_url": "https://mybinder.org",
            "colab_url": "https://colab.research.google.com",
            "notebook_interface": "jupyterlab",
        },
    }
nb_execution_mode = "off"  # the outputs that are committed, and no network
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "attrs_inline"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # as they are written: values would hold paths of this machine
autodoc_inherit_docstrings = False  # torch's say how to write a module
python_maximum_signature_line_length = 80
napoleon_google_docstring = False
napoleon_use_param = False
napoleon_use_rtype = False
suppress_warnings = ["mystnb.unknown_mime_type"]  # widgets: their still pictures are shown


def plain(app, what, name, obj, options, lines):
    """Docstrings here are plain text with ``code`` and nothing else of reStructuredText.

    The lines before the first section of numpydoc ("Parameters") stay as they stand; napoleon reads the sections.
    """

    def escaped(line):
        parts = re.split(r"(``[^`]+``)", line)
        return "".join(p if p.startswith("``") else re.sub(r"([\\*|_`])", r"\\\1", p) for p in parts)

    rules = [i for i, line in enumerate(lines) if re.fullmatch(r"\s*-{3,}\s*", line)]
    end = rules[0] - 1 if rules else len(lines)
    prose = [f"| {escaped(line)}" if line.strip() else "|" for line in lines[:end]]
    sections = []
    for line in lines[end:]:
        name, colon, text = line.partition(" : ")
        if colon and not line.startswith(
            (" ", ">>>")
        ):  # napoleon, which escapes the name, takes the next line for text
            sections += [name, f"    {escaped(text)}"]
        else:
            sections.append(line if line.lstrip().startswith(">>>") else escaped(line))
    lines[:] = [*prose, "", *sections, ""]


def setup(app):
    """Sphinx's hook."""
    app.connect("autodoc-process-docstring", plain, priority=400)  # before napoleon
