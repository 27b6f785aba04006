"""A report as Markdown: a model card. Characters that mean something in Markdown or HTML are escaped in every text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from scperturbdiff.reporting._blocks import Code, Figure, Fold, Items, Table, Text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from scperturbdiff.reporting._blocks import Block, Section

SPECIAL = re.compile(r"([\\`*_\[\]<>|~$&])")
LEADING = re.compile(r"^(\d*)([#+=.)-])")
"""What makes a heading or a list of a line that begins with it."""


def to_markdown(title: str, sentences: Iterable[str], sections: Iterable[Section]) -> str:
    """The whole file."""
    lines = [f"# {_escape(title)}", "", *(_escape(sentence) + "\n" for sentence in sentences)]
    for section in sections:
        lines += [f"## {_escape(section.title)}", ""]
        for block in section.blocks:
            lines += _lines(block)
    return "\n".join(lines).rstrip() + "\n"


def _cell(text: str) -> str:
    return SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _escape(text: str) -> str:
    """Text at the beginning of a line."""
    return LEADING.sub(r"\1\\\2", _cell(text))


def _lines(block: Block) -> list[str]:
    match block:
        case Text():
            return [_escape(block.text), ""]
        case Items():
            return [*(f"- {_escape(item)}" for item in block.items), ""]
        case Code():
            # a fence longer than any in the text cannot be closed by it
            longest = max((len(run) for run in re.findall(r"`+", block.text)), default=0)
            fence = "`" * max(3, longest + 1)
            return [fence, *block.text.splitlines(), fence, ""]
        case Table():
            rule = "|" + " --- |" * len(block.header)
            lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in (block.header, *block.rows)]
            return [lines[0], rule, *lines[1:], ""]
        case Figure():
            return []
        case Fold():
            note = f" ({_cell(block.note)})" if block.note else ""
            return [f"### {_escape(block.title)}{note}", "", *(line for part in block.blocks for line in _lines(part))]
