"""The site (make docs): Markdown through MyST, and the reference from microadam's docstrings.

The source folder is the root of the repository, so that a link is the same for a reader of the
site and of the repository, and README and the tables in results/ are pages too. The build is
strict: a link, an anchor or a reference in a docstring that leads nowhere fails it. Links to other
sites take the network: python -m sphinx -b linkcheck -c docs . build/links
"""

import microadam

project = "MicroAdam"
release = microadam.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

root_doc = "docs/index"
include_patterns = ["README.md", "CHANGELOG.md", "docs/*", "results/*.md"]
exclude_patterns = [".*", "build", "data", "results/runs", "wandb"]  # folders not to look into
myst_heading_anchors = 3  # headings as targets of links, named as GitHub names them

highlight_language = "none"  # of blocks that name none
default_role = "py:obj"  # `name` in a docstring is a reference to it
nitpicky = True
# Of other projects: to look them up would take the network.
nitpick_ignore_regex = [(r"py:.*", r"(torch|collections)\..*|Tensor|DTensor|Optimizer|Metadata")]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"

html_theme = "furo"
html_title = f"MicroAdam {release}"
html_extra_path = ["static/index.html"]  # leads to the first page
html_static_path = ["static/wide.css"]
html_css_files = ["wide.css"]
html_show_copyright = False
html_copy_source = False
