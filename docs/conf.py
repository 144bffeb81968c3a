"""Sphinx configuration. `make docs` builds the site offline and fails on any warning."""

from typing import Any

from docutils.nodes import Element
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

import tq_lightning

project = "tq_lightning"
author = "The tq_lightning authors"
copyright = author
version = release = tq_lightning.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"tq_lightning {release}"
html_permalinks_icon = "#"
html_static_path = ["_static"]
html_css_files = ["wrap.css"]  # commands longer than the page

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
default_role = "literal"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
# Types of other packages: their documentation would have to be downloaded to link them.
nitpick_ignore_regex = [
    (
        "py:.*",
        r"(torch|lightning|numpy|np|pathlib|collections|contextlib|typing|os|argparse|nn|L)\..*",
    ),
    (
        "py:class",
        r"Tensor|Path|Any|Iterable|Iterator|Sequence|Mapping|Callable|Collection|optional",
    ),
]


def check_public_names(app: Sphinx, env: BuildEnvironment) -> None:
    """Fail on a public name that no page documents."""
    documented = {entry[0] for entry in env.get_domain("py").get_objects()}
    for name in tq_lightning.__all__:
        if f"tq_lightning.{name}" not in documented:
            message = (
                f"the public name tq_lightning.{name} is not documented; add it to docs/api.md"
            )
            logging.getLogger(__name__).warning(message)


def resolve_short_name(
    app: Sphinx, env: BuildEnvironment, node: Element, contnode: Element
) -> Element | None:
    """Resolve `UserError` in a docstring to the one documented object of that name."""
    target = node.get("reftarget", "")
    found = [o for o in env.get_domain("py").get_objects() if o[0].endswith(f".{target}")]
    if node.get("refdomain") != "py" or len(found) != 1:
        return None
    name, _, _, page, anchor, _ = found[0]
    return make_refnode(app.builder, node["refdoc"], page, anchor, contnode, name)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the two handlers."""
    app.connect("env-check-consistency", check_public_names)
    app.connect("missing-reference", resolve_short_name)
    return {"parallel_read_safe": True}
