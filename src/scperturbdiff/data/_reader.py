"""Counts of cells in any order, for mini-batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from anndata.abc import CSRDataset
from scipy import sparse

from scperturbdiff.data._counts import iter_counts
from scperturbdiff.data._rows import is_on_disk

if TYPE_CHECKING:
    from numpy.typing import NDArray


AHEAD_BYTES = 2**28
"""Memory for cells of a matrix on disk that are read before they are needed."""


class CountReader:
    """Rows of a matrix of counts, in memory or on disk, as dense float32.

    A store is compressed in pieces of many rows, so that a few random rows cost nearly as much as all of them. Those of
    many mini-batches are therefore read together.

    Parameters
    ----------
    matrix
        Counts, `(n_cells, n_genes)`. Those on disk are checked while they are read.
    where
        How messages name the matrix.

    Attributes
    ----------
    ahead
        Rows that can be announced at a time; 0 for a matrix in memory.
    """

    def __init__(self, matrix: Any, where: str = "adata.X") -> None:
        self.matrix, self.where = matrix, where
        self.ahead = max(1, int(AHEAD_BYTES // _row_bytes(matrix))) if is_on_disk(matrix) else 0
        self._rows = np.empty(0, np.int64)
        self._block: Any = None

    def announce(self, rows: NDArray[np.int64]) -> None:
        """Read rows that will be asked for; they take the place of those announced before."""
        self._rows, self._block = np.unique(rows), None
        if len(self._rows):
            blocks = list(iter_counts(self.matrix, self._rows, where=self.where))
            is_sparse = sparse.issparse(blocks[0])
            self._block = sparse.vstack(blocks, format="csr") if is_sparse else np.concatenate(blocks)

    def __call__(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Counts `(n, n_genes)` of `rows`."""
        block: Any = None
        if self._block is not None:
            at = np.minimum(np.searchsorted(self._rows, rows), len(self._rows) - 1)
            block = self._block[at] if np.array_equal(self._rows[at], rows) else None
        if block is None and self.ahead:
            (block,) = iter_counts(self.matrix, rows, len(rows), self.where)
        elif block is None:
            block = self.matrix[rows]
        dense: NDArray[np.float32] = block.toarray() if sparse.issparse(block) else np.asarray(block)
        return dense.astype(np.float32, copy=False)


def _row_bytes(matrix: Any) -> float:
    """Bytes of a row in memory, on average."""
    if isinstance(matrix, CSRDataset):
        return 8 * matrix.group["indices"].shape[0] / max(matrix.shape[0], 1) + 8
    return float(matrix.dtype.itemsize * matrix.shape[1])
