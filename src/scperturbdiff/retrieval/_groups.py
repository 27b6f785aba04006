"""Rows that agree: what is the same for several of many conditions is worked out once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Groups:
    """`n` rows in groups that agree.

    Attributes
    ----------
    code
        Group of each row, `(n,)`.
    first
        A row of each group, `(n_groups,)`.
    count
        Rows of each group, `(n_groups,)`.
    rows
        Rows of group 0, then those of group 1 and so on, `(n,)`.
    start
        Where those of each group start, `(n_groups,)`.
    """

    code: NDArray[np.int64]
    first: NDArray[np.int64]
    count: NDArray[np.int64]
    rows: NDArray[np.int64]
    start: NDArray[np.int64]

    @classmethod
    def of(cls, *columns: NDArray) -> Groups:
        """Groups of rows that agree, bit by bit, in all `columns`, `(n,)` or `(n, c)` each."""
        tables = [np.ascontiguousarray(column.reshape(len(column), -1)) for column in columns]
        joined = np.concatenate([table.view(np.uint8).reshape(len(table), -1) for table in tables], axis=1)
        keys = joined.view(np.dtype((np.void, joined.shape[1]))).reshape(-1)
        _, first, code, count = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
        code = code.reshape(-1)
        return cls(code, first, count, np.argsort(code, kind="stable"), np.cumsum(count) - count)

    def __len__(self) -> int:
        return len(self.first)

    def members(self, groups: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of `groups`, those of one after those of another."""
        count = self.count[groups]
        ahead = self.start[groups] - (np.cumsum(count) - count)
        found: NDArray[np.int64] = self.rows[np.repeat(ahead, count) + np.arange(count.sum())]
        return found
