"""Training populations: treated cells that share a condition, with the control cells matched to them."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from scperturbdiff.data._groups import Groups, group_rows
from scperturbdiff.data._labels import DOSE, PERTURBATION
from scperturbdiff.data._messages import preview

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from numpy.typing import NDArray

    from scperturbdiff.data._conditions import ConditionSpace

    Ints = NDArray[np.int64]


logger = logging.getLogger(__name__)

MOST_PAIRS = 2**26
"""Groups of treated cells times groups of controls that are compared, at most: 1 GB."""


@dataclass(frozen=True)
class ControlMatch:
    """Which control cells belong to each population."""

    groups: Groups
    """Groups of control rows."""
    group: Ints
    """Group of each population, `(n_populations,)`."""
    n_agreeing: Ints
    """Keys on which a population and its controls agree, `(n_populations,)`; `len(keys)` is an exact match."""
    keys: tuple[str, ...]
    """The keys compared, the most important first."""

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
    populations, controls
        One row per population and per control cell, same columns.
    control_rows
        Row number of each control cell in the data.
    keys
        Columns compared, the most important first: it decides between controls that agree on equally many.
    required
        Columns on which controls must agree; where none does, a `ValueError` names the populations.
    """
    keys = tuple(keys)
    groups, codes = group_rows(controls, keys)
    members = Groups.from_codes(codes, control_rows, len(groups))
    kinds, kind = group_rows(populations, keys)  # populations that agree on all keys have the same controls
    n_agreeing, weight = _agreement(kinds, groups, keys, required)
    lost = (weight.max(axis=1, initial=-1) < 0)[kind] if len(groups) else np.ones(len(populations), bool)
    if lost.any():
        named = populations.loc[lost, list(required)].drop_duplicates().astype(str).agg(" / ".join, axis=1)
        raise ValueError(
            f"{int(lost.sum())} populations have no control cells: no control agrees on {list(required)} = "
            f"{preview(named)}. Add their controls, or pass control_match_keys=[...] to choose the keys on which "
            "controls must agree."
        )
    chosen = weight == weight.max(axis=1, keepdims=True)
    patterns, group = np.unique(chosen, axis=0, return_inverse=True)
    matched = Groups.from_lists([np.concatenate([members[int(g)] for g in np.flatnonzero(p)]) for p in patterns])
    n_agreeing = n_agreeing[np.arange(len(kinds)), weight.argmax(axis=1)]
    return ControlMatch(matched, group.reshape(-1)[kind], n_agreeing[kind], keys)


def _agreement(
    ours: pd.DataFrame, theirs: pd.DataFrame, keys: Sequence[str], required: Sequence[str]
) -> tuple[Ints, NDArray[np.float64]]:
    """On how many keys rows of two tables agree, and how well, negative where a required one differs, `(n, m)` each."""
    shape = len(ours), len(theirs)
    if shape[0] * shape[1] > MOST_PAIRS:
        raise ValueError(
            f"{shape[0]} groups of treated and {shape[1]} of control cells differ in {preview(keys)}: too many. "
            "Are cells told apart by a column that is different in nearly every one?"
        )
    n_agreeing, weight = np.zeros(shape, np.int64), np.zeros(shape)
    for i, key in enumerate(keys):
        agree = ours[key].astype(str).to_numpy()[:, None] == theirs[key].astype(str).to_numpy()
        n_agreeing += agree
        weight += agree * (1 + 0.5 ** (i + 2))
    for key in required:
        differ = ours[key].astype(str).to_numpy()[:, None] != theirs[key].astype(str).to_numpy()
        weight[differ] = -1.0
    return n_agreeing, weight


@dataclass(frozen=True)
class PopulationTable:
    """Treated populations with their matched controls; arrays as :class:`ConditionSpace` encodes conditions."""

    labels: pd.DataFrame
    """One row per population: perturbation, dose, contexts, covariates and batch."""
    cells: Groups
    """Rows of the treated cells of each population."""
    match: ControlMatch
    component: Ints
    dose: NDArray[np.float64]
    categories: Ints
    numbers: NDArray[np.float64]
    context: Ints
    controls: Groups
    """Rows of the control cells grouped by :attr:`ConditionSpace.obs_keys`: populations with no perturbation."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: NDArray[np.int64]) -> PopulationTable:
        """The populations of `rows`, with all controls."""
        encoded = ("component", "dose", "categories", "numbers", "context")
        return replace(
            self,
            labels=self.labels.iloc[rows].reset_index(drop=True),
            cells=Groups.from_lists([self.cells[r] for r in rows]),
            match=replace(self.match, group=self.match.group[rows], n_agreeing=self.match.n_agreeing[rows]),
            **{name: getattr(self, name)[rows] for name in encoded},
        )

    @cached_property
    def condition(self) -> NDArray[np.int64]:
        """Number of each population's condition: perturbation, dose and context."""
        keys = np.concatenate([self.component, self.dose, self.context[:, None]], axis=1)
        return np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1)

    @property
    def n_of_several_covariates(self) -> int:
        """Number of conditions with populations that differ in covariates, which are taken for replicates."""
        rows = np.column_stack([self.condition, self.categories, self.numbers])
        once = np.unique(rows, axis=0)[:, 0]
        return int((np.unique(once, return_counts=True)[1] > 1).sum())

    def little_evidence(self, few: int) -> list[str]:
        """Names of the populations with less than `few` cells, or without controls that match on every key."""
        thin = np.flatnonzero((self.cells.count < few) | ~self.match.exact)
        return [" / ".join(filter(None, map(str, row))) for row in self.labels.iloc[thin].itertuples(index=False)]

    @property
    def report(self) -> pd.DataFrame:
        """One row per population: labels, numbers of cells and of controls, and whether controls match exactly."""
        out = self.labels.rename(columns={PERTURBATION: "perturbation", DOSE: "dose"})
        n_controls = self.match.groups.count[self.match.group] if len(self) else np.empty(0, np.int64)
        return out.assign(n_cells=self.cells.count, n_controls=n_controls, exact_match=self.match.exact)


def build_populations(space: ConditionSpace, obs: pd.DataFrame) -> PopulationTable:
    """Group the cells of a data set into populations and match their controls; without these a `ValueError`."""
    labels = space.read_labels(obs)
    control = space.is_control(labels)
    keys = [PERTURBATION, DOSE, *space.obs_keys]
    rows = np.arange(len(labels))
    if not control.any():
        raise ValueError(f"There are no control cells (obs[{space.perturbation_key!r}] == {space.control!r}).")
    treated = labels[~control]
    table, codes = group_rows(treated, keys)
    cells = Groups.from_codes(codes, rows[~control], len(table))
    required = [k for k in space.context_keys if k in space.control_match_keys]
    _warn_of_populations(table, cells)
    match = match_controls(table, labels[control], rows[control], space.control_match_keys, required)
    if inexact := int((~match.exact).sum()):
        text = "%d of %d populations have no controls that agree on all of %s; the nearest were taken. "
        logger.warning(text + "See model.populations.", inexact, len(table), list(match.keys))
    groups, control_codes = group_rows(labels[control], list(space.obs_keys))
    controls = Groups.from_codes(control_codes, rows[control], max(len(groups), 1))
    encoded = (*space.encode_perturbations(table), *space.encode_covariates(table), space.context_codes(table))
    return PopulationTable(table, cells, match, *encoded, controls)


def _warn_of_populations(table: pd.DataFrame, cells: Groups) -> None:
    n = len(table)
    if n > 100 and n > (n_cells := cells.count.sum()) / 2:
        text = "There are %d populations for %d treated cells: is a continuous covariate different in every cell?"
        logger.warning(text, n, n_cells)
    if single := int((cells.count == 1).sum()):
        text = "%d of %d populations have a single cell; they say little about the shape of a population."
        logger.warning(text, single, n)
