"""What a split is, and the labels of a screen it is made from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from scperturbdiff.data import check_obs_key, closest, preview

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

    Mask = NDArray[np.bool_]
    Context = tuple[str, ...]


Kind = Literal["pairs", "contexts", "perturbations", "combinations", "batches"]


@dataclass(frozen=True, eq=False)
class Split:
    """Which cells to train on and which to predict.

    Cells that are neither (`left_out`) would give the answer away without being what is asked, e.g. the single
    perturbation of a component that a held-out combination must not have seen.
    """

    train: Mask
    """Cells to train on, shape `(n_cells,)`."""
    test: Mask
    """Held-out treated cells, shape `(n_cells,)`."""
    controls: Mask
    """Control cells of the contexts of the held-out conditions, to predict from, shape `(n_cells,)`. They may also be
    in `train`."""
    kind: Kind
    """What was held out."""
    description: str
    """One sentence about the split."""
    held_out: pd.DataFrame
    """Held-out conditions: columns of the perturbation, the contexts and (with batches) the batch, and `n_cells`."""
    labels: tuple[str, ...]
    """The contexts, components, combinations or batches that were held out, as text; for pairs the conditions."""
    perturbation_key: str
    context_keys: tuple[str, ...]
    batch_key: str | None
    control: str
    separator: str
    summary: pd.DataFrame
    """See :meth:`report`."""

    @property
    def left_out(self) -> Mask:
        """Cells that are neither for training nor for testing nor controls to predict from, shape `(n_cells,)`."""
        return ~(self.train | self.test | self.controls)

    def report(self) -> pd.DataFrame:
        """Numbers of cells, treated cells, conditions, perturbations and contexts in each part of the split."""
        return self.summary.copy()


class Screen:
    """The labels of a screen's cells as text, with the codes of conditions."""

    def __init__(
        self,
        adata: AnnData,
        perturbation_key: str,
        control: str,
        context_keys: Sequence[str] = (),
        batch_key: str | None = None,
        separator: str = "+",
    ) -> None:
        if isinstance(context_keys, str):
            context_keys = (context_keys,)
        self.perturbation_key, self.context_keys, self.batch_key = perturbation_key, tuple(context_keys), batch_key
        self.control, self.separator = str(control), separator
        self.perturbation = read_labels(adata, perturbation_key, "perturbation_key")
        columns = {key: read_labels(adata, key, "context_keys") for key in self.context_keys}
        self.context_table = pd.DataFrame(columns, index=pd.RangeIndex(adata.n_obs))
        self.contexts: list[Context] = [()]
        self.context_code = np.zeros(adata.n_obs, dtype=np.intp)
        if columns:
            self.context_code = self.context_table.groupby(list(columns), sort=True).ngroup().to_numpy()
            self.contexts = sorted(self.context_table.drop_duplicates().itertuples(index=False, name=None))
        self.batch = None if batch_key is None else read_labels(adata, batch_key, "batch_key")
        self.perturbation_code, names = pd.factorize(self.perturbation, sort=True)
        self.perturbations: list[str] = list(names)
        self.is_control = self.perturbation == self.control
        if not self.is_control.any():
            known = np.unique(self.perturbation)
            near = closest(control, known)
            hint = f" Did you mean {preview(near)}?" if near else ""
            raise ValueError(
                f"control={control!r} does not occur in adata.obs[{perturbation_key!r}].{hint} "
                f"Values: {preview(known, 30)}."
            )

    def contexts_of(self, cells: Mask) -> set[Context]:
        """Contexts that the cells of a mask have."""
        return {self.contexts[code] for code in np.unique(self.context_code[cells])}

    def in_contexts(self, contexts: Iterable[Context]) -> Mask:
        """Cells of these contexts."""
        return np.isin(self.context_code, [self.contexts.index(context) for context in contexts])

    @cached_property
    def condition_code(self) -> NDArray[np.intp]:
        """A number for each cell's (perturbation, context), shape `(n_cells,)`."""
        return self.perturbation_code * len(self.contexts) + self.context_code

    @cached_property
    def conditions(self) -> dict[tuple[str, Context], int]:
        """Treated (perturbation, context) conditions and their codes."""
        codes = np.unique(self.condition_code[~self.is_control])
        n = len(self.contexts)
        return {(self.perturbations[code // n], self.contexts[code % n]): int(code) for code in codes}

    @cached_property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """Components of every treated label."""
        return {p: split_label(p, self.separator) for p in self.perturbations if p != self.control}

    def containing(self, components: Iterable[str]) -> Mask:
        """Treated cells whose perturbation contains one of `components`."""
        wanted = set(components)
        labels = [label for label, parts in self.parts.items() if wanted.intersection(parts)]
        return np.isin(self.perturbation, labels) & ~self.is_control

    def make(
        self,
        kind: Kind,
        description: str,
        labels: Iterable[str],
        *,
        train: Mask,
        test: Mask,
    ) -> Split:
        """Complete a split from its two masks."""
        if not train.any() or not test.any():
            raise ValueError(f"The split has {int(train.sum())} cells to train on and {int(test.sum())} to test.")
        controls = self.is_control & self.in_contexts(self.contexts_of(test))
        table = pd.DataFrame({self.perturbation_key: self.perturbation}).join(self.context_table)
        if self.batch is not None and self.batch_key not in table:
            table[self.batch_key] = self.batch
        held_out = table[test].groupby(list(table.columns), sort=True).size().rename("n_cells").reset_index()
        left_out = ~(train | test | controls)
        masks = {"train": train, "test": test, "controls": controls, "left_out": left_out}
        return Split(
            train=train,
            test=test,
            controls=controls,
            kind=kind,
            description=description,
            held_out=held_out,
            labels=tuple(labels),
            perturbation_key=self.perturbation_key,
            context_keys=self.context_keys,
            batch_key=self.batch_key,
            control=self.control,
            separator=self.separator,
            summary=pd.DataFrame({name: self._describe(mask) for name, mask in masks.items()}).T,
        )

    def _describe(self, mask: Mask) -> dict[str, int]:
        treated = mask & ~self.is_control
        return {
            "n_cells": int(mask.sum()),
            "n_treated_cells": int(treated.sum()),
            "n_conditions": np.unique(self.condition_code[treated]).size,
            "n_perturbations": np.unique(self.perturbation_code[treated]).size,
            "n_contexts": np.unique(self.context_code[mask]).size,
        }


def split_label(label: str, separator: str) -> tuple[str, ...]:
    """Components of a perturbation's name."""
    return tuple(part.strip() for part in label.split(separator))


def context_name(context: Sequence[str]) -> str:
    """A context of one or more columns as text."""
    return ", ".join(context)


def read_labels(adata: AnnData, key: str, argument: str) -> NDArray[np.object_]:
    """A column of `adata.obs` as text; raises where it is missing or has missing values."""
    check_obs_key(adata, key, argument)
    column = adata.obs[key]
    missing = int(column.isna().sum())
    if missing:
        raise ValueError(f"adata.obs[{key!r}] is missing in {missing} of {adata.n_obs} cells. Remove or label them.")
    if isinstance(column.dtype, pd.CategoricalDtype):
        return column.cat.categories.astype(str).to_numpy(dtype=object)[column.cat.codes]
    return column.astype(str).to_numpy(dtype=object)
