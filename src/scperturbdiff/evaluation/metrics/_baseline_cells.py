"""Cells of the baselines an evaluation is asked for: given, predicted by fitted objects, or fitted here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from scperturbdiff.data import COUNTS, N_CELLS
from scperturbdiff.evaluation.metrics._inputs import is_anndata

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData
    from numpy.typing import NDArray

    from scperturbdiff.evaluation.metrics._inputs import Condition, Keys


class Controls(NamedTuple):
    """Real control cells: their label in the training cells (if known), the AnnData, and the rows per context."""

    label: str | None
    adata: AnnData
    rows: Mapping[Condition, NDArray[np.intp]]


class Cells(NamedTuple):
    """Cells to score, the layer of their counts, and whether they may lack conditions (scored as NaN)."""

    adata: AnnData
    layer: str | None
    partial: bool = False


def baseline_cells(
    baselines: Any,
    train: AnnData | None,
    controls: Controls,
    sizes: Mapping[Condition, int],
    keys: Keys,
    *,
    layers: tuple[str | None, str | None],
    seed: int,
) -> dict[str, Cells]:
    """Cells of every baseline.

    `sizes` holds the number of real cells per condition; `layers` those of predictions and of real cells. A fitted
    object with `can_predict` is asked only for the conditions it can predict and left out if there are none.
    """
    if baselines is None or (isinstance(baselines, str) and baselines == "default" and train is None):
        return {}
    if isinstance(baselines, str):
        if baselines != "default":
            raise ValueError(f"baselines={baselines!r} is unknown. Allowed: 'default', a mapping of names, None.")
        baselines = _fit_default(train, controls, keys, layers[1])
    cells: dict[str, Cells] = {}
    for name, baseline in baselines.items():
        if is_anndata(baseline):
            cells[name] = Cells(baseline, layers[0])
        elif hasattr(baseline, "predict"):
            predicted = _predict(baseline, controls, sizes, keys, seed)
            if predicted is not None:
                cells[name] = Cells(predicted, COUNTS, partial=hasattr(baseline, "can_predict"))
        else:
            raise TypeError(
                f"baselines[{name!r}] must be an AnnData of cells or a fitted object with a predict method, "
                f"not {type(baseline)}."
            )
    return cells


def _fit_default(train: Any, controls: Controls, keys: Keys, layer: str | None) -> dict[str, Any]:
    if controls.label is None:
        raise ValueError(
            "The default baselines need the label of the control cells in train: pass control as a label, fitted "
            "baselines, or baselines=None."
        )
    from scperturbdiff.evaluation.baselines import default_baselines

    # The rules for every kind of split; those that know nothing of any condition drop out in _predict.
    fitted: dict[str, Any] = {**default_baselines("pairs"), **default_baselines("combinations")}
    for baseline in fitted.values():
        baseline.fit(
            train,
            perturbation_key=keys.perturbation,
            control=controls.label,
            context_keys=list(keys.contexts),
            layer=layer,
        )
    return fitted


def _predict(
    baseline: Any, controls: Controls, sizes: Mapping[Condition, int], keys: Keys, seed: int
) -> AnnData | None:
    """Let a fitted object predict the conditions it can, context by context; `None` if it can do none."""
    import anndata as ad

    from scperturbdiff.evaluation.baselines import Baseline

    can_predict = getattr(baseline, "can_predict", lambda perturbation, context: True)
    per_context: dict[Condition, list[Condition]] = {}
    for condition in sizes:
        if can_predict(condition[-1], keys.context(condition)):
            per_context.setdefault(keys.context(condition), []).append(condition)
    parts = []
    for context, conditions in per_context.items():
        cells = controls.adata[controls.rows[context]]
        cells = cells.to_memory() if cells.isbacked else cells.copy()
        number = [sizes[condition] for condition in conditions]
        wanted: Any = [condition[-1] for condition in conditions]
        if keys.conditions or isinstance(baseline, Baseline):
            columns = [*keys.conditions, keys.perturbation]
            wanted = pd.DataFrame([c[len(context) :] for c in conditions], columns=columns)
        if isinstance(baseline, Baseline):
            wanted[N_CELLS] = number
        parts.append(baseline.predict(cells, wanted, n_cells=max(number), seed=seed))
    return ad.concat(parts, index_unique="-", merge="same") if parts else None
