"""Populations: treated cells that share a condition, and the control cells matched to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scperturbdiff.data.counts import preview

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Ragged:
    """Groups of row numbers of different sizes: group `g` is `rows[start[g] : start[g] + count[g]]`."""

    rows: Ints
    start: Ints
    count: Ints

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, group: int) -> Ints:
        return self.rows[self.start[group] : self.start[group] + self.count[group]]

    @classmethod
    def from_codes(cls, codes: Ints, rows: Ints, n_groups: int) -> Ragged:
        """Group `rows` by `codes`."""
        order = np.argsort(codes, kind="stable")
        count = np.bincount(codes, minlength=n_groups).astype(np.int64)
        return cls(rows[order], np.cumsum(count) - count, count)

    @classmethod
    def from_lists(cls, groups: Sequence[Ints]) -> Ragged:
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


@dataclass(frozen=True)
class ControlMatch:
    """Which control cells belong to each population.

    Attributes
    ----------
    pools
        Groups of control rows.
    pool
        Pool of each population, `(n_populations,)`.
    n_agreeing
        Keys on which a population and its controls agree, `(n_populations,)`; `len(keys)` is an exact match.
    keys
        The keys compared, the most important first.
    """

    pools: Ragged
    pool: Ints
    n_agreeing: Ints
    keys: tuple[str, ...]

    @property
    def exact(self) -> NDArray[np.bool_]:
        """Populations whose controls agree on every key."""
        return self.n_agreeing == len(self.keys)


def match_controls(
    populations: pd.DataFrame,
    controls: pd.DataFrame,
    control_rows: Ints,
    keys: Sequence[str],
    required: Sequence[str] = (),
) -> ControlMatch:
    """Match each population to the control cells that agree with it on most of `keys`.

    Parameters
    ----------
    populations
        One row per population.
    controls
        One row per control cell, same columns.
    control_rows
        Row number of each control cell in the data.
    keys
        Columns compared, the most important first: it decides between controls that agree on equally many.
    required
        Columns on which controls must agree.

    Raises
    ------
    ValueError
        If a population has no control that agrees on `required`; the message names them.
    """
    keys = tuple(keys)
    groups, codes = group_rows(controls, keys)
    members = Ragged.from_codes(codes, control_rows, len(groups))
    agree = np.ones((len(populations), len(groups), max(len(keys), 1)), bool)
    for i, key in enumerate(keys):
        agree[:, :, i] = populations[key].astype(str).to_numpy()[:, None] == groups[key].astype(str).to_numpy()[None, :]
    n_agreeing = agree[:, :, : len(keys)].sum(-1)
    weight = n_agreeing + (agree[:, :, : len(keys)] * 0.5 ** np.arange(2, len(keys) + 2)).sum(-1)
    for key in required:
        weight = np.where(agree[:, :, keys.index(key)], weight, -1.0)
    lost = (weight.max(axis=1, initial=-1) < 0) if len(groups) else np.ones(len(populations), bool)
    if lost.any():
        named = populations.loc[lost, list(required)].drop_duplicates().astype(str).agg(" / ".join, axis=1)
        raise ValueError(
            f"{int(lost.sum())} populations have no control cells: no control agrees on {list(required)} = "
            f"{preview(named)}. Add their controls, or pass control_match_keys=[...] to choose the keys on which "
            "controls must agree."
        )
    chosen = weight == weight.max(axis=1, keepdims=True)
    patterns, pool = np.unique(chosen, axis=0, return_inverse=True)
    pools = Ragged.from_lists([np.concatenate([members[int(g)] for g in np.flatnonzero(p)]) for p in patterns])
    best = weight.argmax(axis=1)
    return ControlMatch(pools, pool.reshape(-1), n_agreeing[np.arange(len(populations)), best], keys)
