"""Sums over groups of cells, for matrices that are read in blocks of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from scperturbdiff.data._counts import CHUNK_ROWS, iter_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray


def grouped_sums(
    matrix: Any,
    weights: sparse.csr_matrix,
    transform: Callable[[sparse.csr_matrix, NDArray[np.intp]], Sequence[Any]],
    *,
    columns: NDArray[np.integer] | None = None,
    chunk: int = CHUNK_ROWS,
    dtype: Any = np.float64,
) -> list[NDArray[Any]]:
    """Weighted sums over groups of rows of what is made of the matrix.

    Parameters
    ----------
    matrix
        `(n_rows, n_columns)`; dense, sparse or backed. Only rows with a weight are read, in blocks.
    weights
        Weight of each row in each group, `(n_groups, n_rows)`.
    transform
        From a block of rows (CSR) and their numbers to one matrix or more, sparse or dense, with a row for each.
    columns
        Columns wanted, in order; `None`: all.
    chunk
        Rows of a block.
    dtype
        Of the sums.

    Returns
    -------
    For each matrix of `transform` its sums, `(n_groups, n_columns)`.
    """
    used, by_row = np.unique(weights.indices), weights.tocsc()
    sums: list[NDArray[Any]] = []
    start = 0
    for stored in iter_rows(matrix, used, chunk) if used.size else [matrix[:0]]:
        block = sparse.csr_matrix(stored)
        rows = used[start : start + block.shape[0]]
        start += len(rows)
        here = by_row[:, rows].tocsr()
        groups = np.flatnonzero(np.diff(here.indptr))  # of many groups few have rows in a block
        parts = transform(block if columns is None else block[:, columns], rows)
        sums = sums or [np.zeros((weights.shape[0], part.shape[1]), dtype) for part in parts]
        for total, part in zip(sums, parts, strict=True):
            of_groups = here[groups] @ part
            total[groups] += of_groups.toarray() if sparse.issparse(of_groups) else of_groups
    return sums


def member_weights(group: NDArray[np.integer], rows: NDArray[np.integer], shape: tuple[int, int]) -> sparse.csr_matrix:
    """Weights that count how often each of `rows` is in its `group`; `shape` is `(n_groups, n_rows)`."""
    return sparse.csr_matrix((np.ones(len(rows)), (group, rows)), shape=shape)
