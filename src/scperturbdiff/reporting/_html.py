"""A report as one HTML file. Every text goes through :func:`escape`: names of users may hold anything."""

from __future__ import annotations

import base64
from html import escape
from typing import TYPE_CHECKING

from scperturbdiff.reporting._blocks import Code, Figure, Fold, Items, Table, Text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from scperturbdiff.reporting._blocks import Block, Section

BETTER, WORSE = (31, 111, 180), (224, 123, 26)
"""Red, green and blue of the ends of the scale: told apart by people who see no red or green."""

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; color: #222; background: #fff;
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; }
h2 { font-size: 1.2rem; margin-top: 2rem; border-bottom: 1px solid #ddd; }
.summary { background: #f3f6f9; border-left: 4px solid #1f6fb4; padding: .25rem 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .75rem 0; font-size: .875rem; }
th, td { border: 1px solid #ddd; padding: .25rem .5rem; text-align: left; vertical-align: top;
  overflow-wrap: normal; max-width: 32rem; }
th { background: #f3f3f3; }
pre { background: #f3f3f3; padding: .75rem; overflow-x: auto; white-space: pre-wrap; }
details { border: 1px solid #ddd; border-radius: 4px; margin: .5rem 0; padding: 0 .75rem; }
summary { cursor: pointer; padding: .5rem 0; font-weight: 600; }
summary span { font-weight: 400; color: #8a4b00; }
figure { display: inline-block; margin: .5rem 1rem .5rem 0; max-width: 100%; vertical-align: top; }
img { max-width: 100%; height: auto; }
@media print { details::details-content { content-visibility: visible; } }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What a browser may load: nothing but what is in the file."""


def to_html(title: str, sentences: Iterable[str], sections: Iterable[Section]) -> str:
    """The whole file."""
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # an icon of no bytes: browsers ask for one elsewhere
        '<link rel="icon" href="data:,">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        '<div class="summary">',
        *(f"<p>{escape(sentence)}</p>" for sentence in sentences),
        "</div>",
    ]
    for section in sections:
        parts += [f"<section><h2>{escape(section.title)}</h2>", *_blocks(section.blocks), "</section>"]
    return "\n".join([*parts, "</body></html>\n"])


def _blocks(blocks: Iterable[Block]) -> list[str]:
    return [_block(block) for block in blocks]


def _block(block: Block) -> str:
    match block:
        case Text():
            return f"<p>{escape(block.text)}</p>"
        case Items():
            return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in block.items) + "</ul>"
        case Code():
            return f"<pre><code>{escape(block.text)}</code></pre>"
        case Figure():
            data = base64.b64encode(block.png).decode("ascii")
            return f'<figure><img alt="{escape(block.alt)}" src="data:image/png;base64,{data}"></figure>'
        case Table():
            return _table(block)
        case Fold():
            note = f" <span>{escape(block.note)}</span>" if block.note else ""
            inside = "\n".join(_blocks(block.blocks))
            start = "<details open>" if block.is_open else "<details>"
            return f"{start}<summary>{escape(block.title)}{note}</summary>\n{inside}\n</details>"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.header)
    rows = []
    for i, row in enumerate(table.rows):
        colors = (None,) * len(row) if table.colors is None else (None, *table.colors[i])
        cells = "".join(f"<td{_style(color)}>{escape(text)}</td>" for text, color in zip(row, colors, strict=True))
        rows.append(f"<tr>{cells}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _style(color: float | None) -> str:
    """Background of a cell: white at 0; the text stays dark, as the ends are light enough."""
    if color is None:
        return ""
    share = 0.75 * min(abs(color), 1.0)
    end = BETTER if color > 0 else WORSE
    mixed = [round(255 + share * (part - 255)) for part in end]
    return f' style="background: rgb({mixed[0]}, {mixed[1]}, {mixed[2]})"'
