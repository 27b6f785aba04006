"""Groups of cells: row numbers by condition, and sums over groups of a matrix that is read in blocks of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from scperturbdiff.data._rows import CHUNK_ROWS, iter_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Groups:
    """Groups of row numbers of different sizes: group `g` is `rows[start[g] : start[g] + count[g]]`."""

    rows: Ints
    start: Ints
    count: Ints

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, group: int) -> Ints:
        return self.rows[self.start[group] : self.start[group] + self.count[group]]

    def some(self, group: int, n: int, rng: np.random.Generator) -> Ints:
        """A random choice of `n` rows of a group, all of fewer, in order."""
        return np.sort(rng.permutation(self[group])[:n])

    @classmethod
    def from_codes(cls, codes: Ints, rows: Ints, n_groups: int) -> Groups:
        """Group `rows` by `codes`."""
        order = np.argsort(codes, kind="stable")
        count = np.bincount(codes, minlength=n_groups).astype(np.int64)
        return cls(rows[order], np.cumsum(count) - count, count)

    @classmethod
    def from_lists(cls, groups: Sequence[Ints]) -> Groups:
        """Group as given."""
        count = np.array([len(g) for g in groups], np.int64)
        rows = np.concatenate(groups) if len(groups) else np.empty(0, np.int64)
        return cls(rows, np.cumsum(count) - count, count)


def group_rows(table: pd.DataFrame, keys: Sequence[str]) -> tuple[pd.DataFrame, Ints]:
    """Unique combinations of `keys` (in sorted order) and the number of each row's combination."""
    if not keys:
        return pd.DataFrame(index=[0]), np.zeros(len(table), np.int64)
    grouped = table.groupby(list(keys), observed=True, sort=True, dropna=False)
    codes: Ints = grouped.ngroup().to_numpy().astype(np.int64)
    first = np.unique(codes, return_index=True)[1]
    return table[list(keys)].iloc[first].reset_index(drop=True), codes


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
        `(n_rows, n_columns)`; dense, sparse or backed. Only rows with a weight are read, `chunk` at a time.
    weights
        Weight of each row in each group, `(n_groups, n_rows)`.
    transform
        From a block of rows (CSR) and their numbers to one matrix or more, sparse or dense, with a row for each.
    columns
        Columns wanted, in order; `None`: all.

    Returns
    -------
    For each matrix of `transform` its sums, `(n_groups, n_columns)`, of type `dtype`.
    """
    used, by_row = np.unique(weights.indices), weights.tocsc()
    sums: list[NDArray[Any]] = []
    start = 0
    for stored in iter_rows(matrix, used, chunk) if used.size else [matrix[:0]]:
        block = sparse.csr_matrix(stored)
        rows = used[start : start + block.shape[0]]
        start += len(rows)
        parts = transform(block if columns is None else block[:, columns], rows)
        sums = sums or [np.zeros((weights.shape[0], part.shape[1]), dtype) for part in parts]
        add_to_groups(sums, by_row, rows, parts)
    return sums


def add_to_groups(
    sums: Sequence[NDArray[Any]], by_row: sparse.csc_matrix, rows: NDArray[np.integer], parts: Sequence[Any]
) -> None:
    """Add to sums over groups what there is of each of `rows`; `by_row` are weights `(n_groups, n_rows)` by row."""
    here = by_row[:, rows].tocsr()
    groups = np.flatnonzero(np.diff(here.indptr))  # of many groups few have rows in a block
    here = here[groups]
    for total, part in zip(sums, parts, strict=True):
        of_groups = here @ part
        total[groups] += of_groups.toarray() if sparse.issparse(of_groups) else of_groups


def member_weights(group: NDArray[np.integer], rows: NDArray[np.integer], shape: tuple[int, int]) -> sparse.csr_matrix:
    """Weights that count how often each of `rows` is in its `group`; `shape` is `(n_groups, n_rows)`."""
    return sparse.csr_matrix((np.ones(len(rows)), (group, rows)), shape=shape)
