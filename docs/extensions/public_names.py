"""Warns (an error with -W) about public names that `api.md` does not list, and listed names that are not there.

Names such as `scperturbdiff.metrics` are made when they are used: the package gets them from a room of its own. Here
they are made known as modules, so that autodoc finds and documents them under the names that users write.
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sphinx.util import logging

if TYPE_CHECKING:
    from sphinx.application import Sphinx

logger = logging.getLogger(__name__)
PACKAGE = "scperturbdiff"
# an entry of an autosummary, or a directive of its own
LISTED = re.compile(rf"^(?:    |\.\. (?:auto\w+|py:data):: (?:{PACKAGE}\.)?)([A-Za-z_][\w.]*)$", re.MULTILINE)


def alias_modules(package: ModuleType) -> None:
    """Make the modules that a package offers importable under the names by which it offers them."""
    for name in getattr(package, "__all__", ()):
        value = getattr(package, name)
        if isinstance(value, ModuleType):
            sys.modules.setdefault(f"{package.__name__}.{name}", value)


def find(dotted: str) -> Any:
    """The object called `dotted` below the package; a submodule is imported where it is not an attribute yet."""
    found: Any = import_module(PACKAGE)
    path = PACKAGE
    for part in dotted.split("."):
        path = f"{path}.{part}"
        found = getattr(found, part) if hasattr(found, part) else import_module(path)
    return found


def public(module: ModuleType) -> dict[str, Any]:
    """Names in `__all__` of a module and, one level down, of the submodules named there."""
    names: dict[str, Any] = {}
    for name in getattr(module, "__all__", ()):
        value = getattr(module, name)
        if isinstance(value, ModuleType):
            names |= {f"{name}.{inner}": getattr(value, inner) for inner in getattr(value, "__all__", ())}
        elif not name.startswith("__"):
            names[name] = value
    return names


def check(app: Sphinx) -> None:
    listed = LISTED.findall((app.srcdir / "api.md").read_text(encoding="utf-8"))
    documented = []
    for name in listed:
        try:
            documented.append(find(name))
        except (AttributeError, ImportError) as error:
            logger.warning("api.md lists %s.%s: %s", PACKAGE, name, error, location="api")
    for name, value in public(import_module(PACKAGE)).items():
        if not any(value is one for one in documented):
            logger.warning("api.md does not list the public name %s.%s", PACKAGE, name, location="api")


def setup(app: Sphinx) -> dict[str, bool]:
    alias_modules(import_module(PACKAGE))
    # before autosummary looks names up
    app.connect("builder-inited", check, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
