"""Lets docstrings be prose: Returns sections and properties with colons (types come from annotations), |x| as text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from sphinx.ext.napoleon import NumpyDocstring

if TYPE_CHECKING:
    from sphinx.application import Sphinx


def parse_returns(self: NumpyDocstring, section: str) -> list[str]:
    """The section as one field, where napoleon would take its first line for a type."""
    return [*self._format_block(":returns: ", self._dedent(self._consume_to_next_section())), ""]


def parse_attribute(self: NumpyDocstring) -> list[str]:
    """The docstring as written, where napoleon would take what precedes a colon for a type."""
    return self._consume_to_end()


def keep_bars(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """An absolute value such as |x|, where reStructuredText would take it for a substitution."""
    lines[:] = [re.sub(r"(?<![\\|])\|(\w+)\|", r"\\|\1\\|", line) for line in lines]


def setup(app: Sphinx) -> dict[str, bool]:
    NumpyDocstring._parse_returns_section = parse_returns  # type: ignore[method-assign]
    NumpyDocstring._parse_attribute_docstring = parse_attribute  # type: ignore[method-assign]
    app.connect("autodoc-process-docstring", keep_bars)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
