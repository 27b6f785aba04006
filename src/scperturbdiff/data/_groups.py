"""Groups of cells: row numbers by condition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Sequence

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
