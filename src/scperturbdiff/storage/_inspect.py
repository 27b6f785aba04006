"""What can be said of an h5ad file of somebody else's before its content is read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import h5py

from scperturbdiff.memory import check_memory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_ENTRIES = 100_000
"""Groups and arrays of a file, at most."""


def check_h5ad(path: str | Path) -> None:
    """Raise an error if a file cannot be an AnnData, reaches outside itself or does not fit into memory.

    HDF5 files may name others as a part of themselves: read as cells, any file of the user could end up in results.

    Raises
    ------
    OSError
        If it is no HDF5 file, or is cut off.
    ValueError
        Names the entry at fault.
    """
    with h5py.File(path, "r") as file:
        sizes = {key: math.prod(data.shape or (0,)) * data.dtype.itemsize for key, data in _arrays(file)}
        if missing := [name for name in ("obs", "var") if name not in file]:
            raise ValueError(f"it has no {' and no '.join(missing)}")
    largest = max(sizes, key=sizes.__getitem__, default="none")
    check_memory(
        sum(sizes.values()), f"its arrays, of which {largest!r} is the largest,", "Read parts of it: open_store(...)."
    )


def _arrays(file: h5py.File) -> Iterator[tuple[str, h5py.Dataset]]:
    """All arrays. Links by path are not followed: what they lead to in this file has a place of its own."""
    todo: list[h5py.Group] = [file]
    found = {file: "/"}
    n = 0
    while todo:
        group = todo.pop()
        for name in group:
            key = f"{found[group].rstrip('/')}/{name}"
            link = group.get(name, getlink=True)
            if isinstance(link, h5py.ExternalLink):
                raise ValueError(f"{key!r} is a link into another file, {link.filename!r}")
            item = group[name] if isinstance(link, h5py.HardLink) else None
            n += 1
            if n > MAX_ENTRIES:
                raise ValueError(f"it has more than {MAX_ENTRIES:,} entries")
            if isinstance(item, h5py.Group):
                if item in found:  # reading would not end, or take twice as long at every step
                    raise ValueError(f"{key!r} is {found[item]!r} by another name")
                found[item] = key
                todo.append(item)
            elif isinstance(item, h5py.Dataset):
                _check_inside(key, item)
                yield key, item


def _check_inside(key: str, data: h5py.Dataset) -> None:
    files = [name for name, *_ in data.external or ()]
    if data.is_virtual:
        files += [source.file_name for source in data.virtual_sources() if source.file_name != "."]
    if files:
        raise ValueError(f"{key!r} is stored in another file, {files[0]!r}")
