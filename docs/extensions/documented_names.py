"""Links a name to where the thing it names is documented, when that is not where it is defined or imported from."""

from __future__ import annotations

from pydoc import locate
from typing import TYPE_CHECKING

from sphinx.ext.intersphinx import missing_reference

if TYPE_CHECKING:
    from docutils.nodes import Element, TextElement
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

PACKAGE = "scperturbdiff."


def other_name(env: BuildEnvironment, target: str) -> str | None:
    """A documented name for the same object, which the package exports under more than one.

    A name that cannot be looked up (annotations may be bare names) stands for the only documented one that ends in it.
    """
    thing = locate(target) if target.startswith(PACKAGE) else None
    last = target.rpartition(".")[2]
    names = env.domains["py"].data["objects"]
    found = [name for name in names if name != target and name.startswith(PACKAGE) and name.rpartition(".")[2] == last]
    if thing is None:
        things = [locate(name) for name in found]
        return found[0] if things and all(one is things[0] for one in things) else None
    return next((name for name in found if locate(name) is thing), None)


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, contents: TextElement) -> Element | None:
    """Look a name that is missing up under the other one: this package's own names here, others' by intersphinx.

    What exists but is no part of the public interface stays plain text; a name that exists nowhere is a warning.
    """
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py":
        return None
    public = app.config.documented_as.get(target)
    if public is not None:
        node["reftarget"] = public
        return missing_reference(app, env, node, contents)
    if target.startswith(PACKAGE) or "." not in target:
        name = other_name(env, target)
        if name is not None:
            domain = env.domains["py"]
            return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], name, node, contents)
    here = node.get("py:module") or ""
    below = target if target.startswith(PACKAGE) else f"{here}.{target}"
    if below.startswith(PACKAGE) and locate(below) is not None:
        return contents
    return None


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_config_value("documented_as", {}, "env")
    app.connect("missing-reference", resolve, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
