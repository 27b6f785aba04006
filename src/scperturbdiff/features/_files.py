"""Text files, plain or gzipped, read line by line; errors name them."""

from __future__ import annotations

import gzip
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import error as DeflateError

from scperturbdiff.arguments import check_type

if TYPE_CHECKING:
    from collections.abc import Iterator

GZIP = b"\x1f\x8b"
"""First bytes of a gzipped file, whatever its name is."""


def check_file(argument: str, path: Any) -> Path:
    """The path of a file that is there."""
    check_type(argument, path, (str, os.PathLike), "the path of a file")
    found = Path(path).expanduser()
    if not found.is_file():
        raise FileNotFoundError(f"{argument}={str(path)!r} is no file.")
    return found


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn what a damaged file causes while it is decoded into a `ValueError` that names it."""
    try:
        yield
    except (UnicodeDecodeError, EOFError, DeflateError, gzip.BadGzipFile) as error:
        raise ValueError(f"{str(path)!r} cannot be read as {kind}: {error}.") from error


def iter_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers, from 1, and lines of a UTF-8 file, without their ends."""
    with path.open("rb") as file:
        packed = file.read(2) == GZIP
    with gzip.open(path, "rt", encoding="utf-8") if packed else path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            yield number, line.rstrip("\r\n")
