"""The report as a value, and its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from scperturbdiff.reporting._html import to_html
from scperturbdiff.reporting._markdown import to_markdown
from scperturbdiff.storage import atomic_file, check_writable

if TYPE_CHECKING:
    import pandas as pd

    from scperturbdiff.reporting._blocks import Section

FORMATS = (".html", ".htm", ".md")
"""Suffixes of files that a report is written to."""


@dataclass(frozen=True)
class Report:
    """What :func:`scperturbdiff.report` returns.

    Attributes
    ----------
    title
        Heading of the page.
    sentences
        The summary: how the prediction compares, how it was made, which conditions not to trust.
    sections
        Everything else, as text in blocks.
    doubts
        For each condition that is not to be trusted, why.
    table, summary
        Results of :func:`~scperturbdiff.evaluate` and :func:`~scperturbdiff.summarize_evaluation`; `None` without real
        cells.
    """

    title: str
    sentences: tuple[str, str, str]
    sections: tuple[Section, ...]
    doubts: dict[str, tuple[str, ...]]
    table: pd.DataFrame | None = None
    summary: pd.DataFrame | None = None

    def __str__(self) -> str:
        return "\n".join(self.sentences)

    def to_html(self) -> str:
        """The page: one file with its style and figures, and no script."""
        return to_html(self.title, self.sentences, self.sections)

    def to_markdown(self) -> str:
        """The same without figures, as a model card or for a repository."""
        return to_markdown(self.title, self.sentences, self.sections)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write HTML (`.html`) or Markdown (`.md`), as a whole or not at all.

        Parameters
        ----------
        path
            The file. Folders above it are made.
        overwrite
            Whether a file that is there is replaced.

        Raises
        ------
        FileExistsError
            If there is one, and it is not to be replaced.
        ValueError
            For another suffix.
        """
        text = self.to_markdown() if check_path(path, overwrite).suffix == ".md" else self.to_html()
        with atomic_file(path, overwrite=overwrite) as partial:
            partial.write_text(text, encoding="utf-8")


def check_path(path: str | Path, overwrite: bool) -> Path:
    """The path, if a report can be written to it."""
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"path={str(path)!r} must end in {', '.join(FORMATS)}.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{str(path)!r} is already there. Pass overwrite=True to replace it, or another path.")
    check_writable(path)
    return path
