"""Blocks of rows of a matrix, in memory or on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


CHUNK_ROWS = 16_384
"""Rows read at a time, so that a backed or sparse matrix is never dense as a whole."""
READ_ROWS = 8192
"""Rows of a matrix on disk that are read in one piece, at most, to take some of them."""
NEAR = 256
"""Rows that are read and not used rather than begin anew: what is on disk is compressed in pieces of many rows."""
COMPRESSED = ("csr", "csc")
"""Sparse formats of which rows can be taken."""


def is_on_disk(matrix: Any) -> bool:
    """Whether a matrix is read from a file or store (HDF5, zarr, dask) whenever rows of it are asked for."""
    return not (isinstance(matrix, np.ndarray) or sparse.issparse(matrix))


def iter_rows(
    matrix: Any, rows: NDArray[np.integer] | None = None, chunk: int = CHUNK_ROWS, where: str = "The matrix"
) -> Iterator[Any]:
    """Yield consecutive blocks of rows in memory, in the order of `rows` (repeats allowed).

    Sparse blocks are sorted and have one entry a place, the sum of duplicates; the matrix itself is not changed. One
    whose arrays do not fit together raises a `ValueError`; `where` is how its message names the matrix.

    Matrices on disk are read from the first to the last row; that is undone here, so that rows come out as asked.
    """
    n = matrix.shape[0] if rows is None else len(rows)
    if sparse.issparse(matrix):
        matrix = matrix if matrix.format in COMPRESSED else matrix.tocsr()
        _check_structure(matrix, where, entries=matrix.format == "csc")
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        if rows is None:
            yield _read(matrix, start, stop, where)
        elif not is_on_disk(matrix):
            yield _canonical(matrix[rows[start:stop]], where)
        else:
            wanted, back = np.unique(rows[start:stop], return_inverse=True)
            block = take_rows(matrix, wanted, where)
            yield block if np.array_equal(back, np.arange(len(wanted))) else block[back]


def take_rows(matrix: Any, rows: NDArray[np.integer], where: str = "The matrix") -> Any:
    """Rows of a matrix on disk, in memory; `rows` are sorted and differ.

    Rows near each other are read together: one by one, the same piece of a store would be decompressed for each.
    """
    apart = (np.diff(rows) > NEAR) | (np.diff(rows // READ_ROWS) > 0)
    parts = []
    for run in np.split(rows, np.flatnonzero(apart) + 1):
        first, last = int(run[0]), int(run[-1])
        part = _read(matrix, first, last + 1, where)
        parts.append(part if len(run) == last + 1 - first else part[run - first])
    if len(parts) == 1:
        return parts[0]
    return sparse.vstack(parts, format="csr") if sparse.issparse(parts[0]) else np.concatenate(parts)


def _read(matrix: Any, start: int, stop: int, where: str) -> Any:
    """Consecutive rows, in memory."""
    block = matrix[start:stop]
    return _canonical(block.compute() if hasattr(block, "compute") else block, where)  # dask computes when asked to


def _canonical(block: Any, where: str) -> Any:
    """A sparse block, checked, its entries sorted and those of the same place summed; a dense one as it is."""
    if not sparse.issparse(block):
        return block
    _check_structure(block, where)
    if not block.has_canonical_format:
        block = block.copy()
        block.sum_duplicates()
    return block


def _check_structure(matrix: Any, where: str, entries: bool = True) -> None:
    """Raise where the arrays of a CSR or CSC matrix do not fit together: SciPy would read and write beyond them.

    `entries` says whether to look at all entries, too, or at the borders of rows (of columns) only.
    """
    (n, width), start = matrix.shape if matrix.format == "csr" else matrix.shape[::-1], matrix.indptr
    n_entries = min(len(matrix.indices), len(matrix.data))
    if len(start) != n + 1 or start[0] != 0 or (start[1:] < start[:-1]).any():
        wrong = f"indptr must rise from 0 in {n + 1} steps"
    elif start[-1] > n_entries:
        wrong = f"indptr ends at {start[-1]}, beyond the {n_entries} entries"
    elif len(matrix.indices) != len(matrix.data):
        wrong = f"{len(matrix.indices)} indices for {len(matrix.data)} entries"
    elif entries and start[-1] and not 0 <= (used := matrix.indices[: start[-1]]).min() <= used.max() < width:
        wrong = f"indices lie between {used.min()} and {used.max()}, not between 0 and {width - 1}"
    else:
        return
    raise ValueError(f"{where} is a damaged {matrix.format.upper()} matrix: {wrong}. Build or download it again.")
