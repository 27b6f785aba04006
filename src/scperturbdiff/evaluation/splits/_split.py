"""What a split is, and the labels of a screen it is made from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from scperturbdiff.data import (
    PERTURBATION,
    Labels,
    check_cells,
    check_obs_keys,
    context_name,
    did_you_mean,
    preview,
    read_contexts,
    read_text,
    value_text,
)

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
    """Held-out conditions: columns of the perturbation (components sorted, without the control), the contexts and (with
    batches) the batch, and `n_cells`."""
    labels: tuple[str, ...]
    """The contexts, components, combinations or batches that were held out, as text; for pairs the conditions."""
    perturbation_key: str
    context_keys: tuple[str, ...]
    batch_key: str | None
    control: str
    separator: str | None
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
    """What a screen's cells are, with the codes of conditions; perturbations under their one name (:class:`Labels`)."""

    def __init__(
        self,
        adata: AnnData,
        perturbation_key: str,
        control: str,
        context_keys: Sequence[str] = (),
        batch_key: str | None = None,
        separator: str | None = "+",
    ) -> None:
        check_cells(adata)
        self.context_keys = (context_keys,) if isinstance(context_keys, str) else tuple(context_keys)
        self.batch_key, self.labels = batch_key, Labels(perturbation_key, control, separator)
        batch = () if batch_key is None else (batch_key,)
        check_obs_keys(adata, perturbation_key=perturbation_key, context_keys=self.context_keys, batch_key=batch)
        self.labels.check_control(adata.obs)
        read = self.labels.read(adata.obs)
        self.perturbation: NDArray[np.object_] = read[PERTURBATION].to_numpy(dtype=object)
        self.is_control = self.labels.is_control(read)
        self.context_code, self.contexts = read_contexts(adata.obs, self.context_keys)
        self.perturbation_code, names = pd.factorize(self.perturbation, sort=True)
        self.perturbations: list[str] = list(names)
        self.table = read_text(adata.obs, list(dict.fromkeys((*self.context_keys, *batch))))
        self.table.insert(0, perturbation_key, self.perturbation)

    def contexts_of(self, cells: Mask) -> set[str]:
        """Names of the contexts that the cells of a mask have."""
        return {context_name(self.contexts[code]) for code in np.unique(self.context_code[cells])}

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
        parts = {name: self.labels.components(name) for name in self.perturbations}
        return {name: components for name, components in parts.items() if components}

    def components_of(self, cells: Mask) -> set[str]:
        """Components of the treated cells of a mask."""
        return {part for label in set(self.perturbation[cells]) for part in self.parts.get(label, ())}

    def containing(self, components: set[str]) -> Mask:
        """Treated cells whose perturbation contains one of `components`."""
        labels = [label for label, parts in self.parts.items() if components.intersection(parts)]
        return np.isin(self.perturbation, labels)

    def known_context(self, context: str | Sequence[str]) -> Context:
        """A context as a tuple of text, checked."""
        values = tuple(context) if isinstance(context, (tuple, list)) else (context,)
        if len(values) != len(self.context_keys):
            raise ValueError(f"Context {context!r} needs one value for each of {preview(self.context_keys)}.")
        found = tuple(map(value_text, values))
        known = [context_name(other) for other in sorted({context for _, context in self.conditions})]
        known_label(context_name(found), known, "Context")
        return found

    def known_pair(self, pair: Sequence[str]) -> tuple[str, Context]:
        """A (perturbation, context values ...) tuple, checked to have cells."""
        perturbation, *values = pair
        label = known_label(self.labels.canonical(perturbation), list(self.parts), "Perturbation")
        context = self.known_context(values)
        if (label, context) not in self.conditions:
            raise ValueError(f"No cell has perturbation {label!r} in context {context_name(context)!r}.")
        return label, context

    def check_pairs(self) -> None:
        """Raise a `ValueError` that names another split where a pair never leaves both of its parts in training."""
        perturbations = sorted({perturbation for perturbation, _ in self.conditions})
        contexts = sorted({context for _, context in self.conditions})
        if len(perturbations) > 1 and len(contexts) > 1:
            return
        if len(contexts) > 1:
            found = f"one perturbation, {perturbations[0]!r}, in {len(contexts)} contexts"
            other = "hold_out_contexts, which asks how it acts in a context where it was not measured"
        elif len(perturbations) > 1:
            found = f"{len(perturbations)} perturbations in one context, {context_name(contexts[0])!r}"
            other = "hold_out_perturbations, or hold_out_combinations where there are any"
        else:
            found = f"one perturbation, {perturbations[0]!r}, in one context, {context_name(contexts[0])!r}"
            other = "hold_out_batches, if it was measured in several batches; nothing else can be left out"
        raise ValueError(
            f"hold_out_pairs needs two perturbations in two contexts at least, and there is {found}. Use {other}."
        )

    def make(self, kind: Kind, description: str, labels: Iterable[str], *, train: Mask, test: Mask) -> Split:
        """Complete a split from its two masks."""
        if not train.any() or not test.any():
            raise ValueError(f"The split has {int(train.sum())} cells to train on and {int(test.sum())} to test.")
        controls = self.is_control & np.isin(self.context_code, self.context_code[test])
        held_out = self.table[test].groupby(list(self.table), sort=True).size().rename("n_cells").reset_index()
        masks = {"train": train, "test": test, "controls": controls}
        parts = {**masks, "left_out": ~(train | test | controls)}
        return Split(
            **masks,
            kind=kind,
            description=description,
            held_out=held_out,
            labels=tuple(labels),
            perturbation_key=self.labels.key,
            context_keys=self.context_keys,
            batch_key=self.batch_key,
            control=str(self.labels.control),
            separator=self.labels.separator,
            summary=pd.DataFrame({name: self._describe(mask) for name, mask in parts.items()}).T,
        )

    def make_whole(self, kind: Kind, names: Iterable[str], n_known: int, inside: Mask, keep_controls: bool) -> Split:
        """Hold out the treated cells of whole contexts or batches; `inside` has also their controls."""
        names, test = list(names), inside & ~self.is_control
        text = f"{len(names)} of {n_known} {kind} held out{'' if keep_controls else ' with their controls'}."
        return self.make(kind, text, names, train=~test if keep_controls else ~inside, test=test)

    def _describe(self, mask: Mask) -> dict[str, int]:
        treated = mask & ~self.is_control
        return {
            "n_cells": int(mask.sum()),
            "n_treated_cells": int(treated.sum()),
            "n_conditions": np.unique(self.condition_code[treated]).size,
            "n_perturbations": np.unique(self.perturbation_code[treated]).size,
            "n_contexts": np.unique(self.context_code[mask]).size,
        }


def pair_name(pair: tuple[str, Context]) -> str:
    """A (perturbation, context) pair as text."""
    return f"{pair[0]} in {context_name(pair[1])}"


def known_label(name: object, known: Sequence[str], what: str) -> str:
    """`name` as text, if it is in `known`; else a `ValueError` with the nearest names."""
    if str(name) not in set(known):
        raise ValueError(
            f"{what} {name!r} does not occur among the treated cells.{did_you_mean(name, known)} "
            f"Known: {preview(known, 30)}."
        )
    return str(name)
