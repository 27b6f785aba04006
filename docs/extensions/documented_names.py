"""Links a name to where the thing it names is documented, when that is not where it is defined or imported from."""

from __future__ import annotations

from pydoc import locate
from typing import TYPE_CHECKING

from sphinx.ext.intersphinx import missing_reference

if TYPE_CHECKING:
    from docutils.nodes import TextElement, reference
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

PACKAGE = "scperturbdiff."


def other_name(app: Sphinx, env: BuildEnvironment, target: str) -> str | None:
    """A documented name for the same object, which the package exports under more than one."""
    thing = locate(target)
    last = target.rpartition(".")[2]
    names = env.domains["py"].data["objects"]
    alike = (name for name in names if name != target and name.rpartition(".")[2] == last)
    return next((name for name in alike if thing is not None and locate(name) is thing), None)


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, contents: TextElement) -> reference | None:
    """Look a name that is missing up under the other one: this package's own names here, others' by intersphinx."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py":
        return None
    if target.startswith(PACKAGE):
        name = other_name(app, env, target)
        if name is None:
            return None
        return env.domains["py"].resolve_xref(env, node["refdoc"], app.builder, node["reftype"], name, node, contents)
    public = app.config.documented_as.get(target)
    if public is None:
        return None
    node["reftarget"] = public
    return missing_reference(app, env, node, contents)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_config_value("documented_as", {}, "env")
    app.connect("missing-reference", resolve, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
