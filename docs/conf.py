"""The site, from the pages of this folder: .ci/site builds it, with every warning an error."""

import re

project = "dblocks_jax"
html_title = "dblocks_jax"
extensions = ["myst_parser"]
html_theme = "furo"  # its pages load nothing from elsewhere
html_copy_source = False
html_show_copyright = False
myst_heading_anchors = 3
highlight_language = "none"

PAGE = re.compile(r"`docs/(\w+)\.(md|ipynb)`")  # a notebook's page has its name


def link_pages(app, docname, source):
    """Pages name each other by their paths, for whoever reads them as files; here those are links."""
    del app, docname
    source[0] = PAGE.sub(r"[`docs/\1.\2`](/\1.md)", source[0])


def setup(app):
    app.connect("source-read", link_pages)
    app.connect("include-read", lambda app, path, docname, source: link_pages(app, docname, source))
