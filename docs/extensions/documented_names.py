"""Names of other projects are linked where those document them, not where they define them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sphinx.ext.intersphinx import missing_reference

if TYPE_CHECKING:
    from docutils.nodes import TextElement, reference
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, contents: TextElement) -> reference | None:
    """Look a name up under `documented_as` when it is missing under its own."""
    public = app.config.documented_as.get(node.get("reftarget"))
    if public is None:
        return None
    node["reftarget"] = public
    return missing_reference(app, env, node, contents)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_config_value("documented_as", {}, "env")
    app.connect("missing-reference", resolve, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
