"""What a report is made of: plain text in blocks, which are written as HTML and as Markdown."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Cells of text.

    `colors` has a number for each cell of `rows` but the first of a row: from -1, worse, over 0 to 1, better; `None`:
    no colour.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    colors: tuple[tuple[float | None, ...], ...] | None = None


@dataclass(frozen=True)
class Code:
    """Lines to be copied."""

    text: str


@dataclass(frozen=True)
class Figure:
    """A picture, as the bytes of a PNG file."""

    png: bytes
    alt: str


@dataclass(frozen=True)
class Fold:
    """Blocks below a title that can be clicked, with a note beside it."""

    title: str
    note: str
    blocks: tuple[Block, ...]
    is_open: bool = False


Block = Text | Items | Table | Code | Figure | Fold


@dataclass(frozen=True)
class Section:
    """Blocks below a title."""

    title: str
    blocks: tuple[Block, ...]
