"""Cells of the baselines an evaluation is asked for: given, predicted by fitted objects, or fitted here."""

from __future__ import annotations

import logging
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import anndata as ad
import pandas as pd
from anndata import AnnData

from scperturbdiff.data import COUNTS, N_CELLS

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from scperturbdiff.evaluation.metrics._inputs import Condition, Keys


logger = logging.getLogger(__name__)


class Controls(NamedTuple):
    """Real control cells: the AnnData, and the rows per context."""

    adata: AnnData
    rows: Mapping[Condition, NDArray[np.intp]]


OK, UNDEFINED, UNAVAILABLE, NOT_FITTED = "ok", "undefined", "unavailable", "not fitted"
"""What a value of the table is; without cells: the metric has none, there is no prediction, there is no rule."""


class Cells(NamedTuple):
    """Cells to score, and the layer with their expression."""

    adata: AnnData | None
    """`None` where nothing could be predicted."""
    layer: str | None
    absent: Mapping[Condition, str] = MappingProxyType({})
    """Why there is no prediction of a condition, for those that have none."""
    status: str = UNAVAILABLE
    """Of values of conditions that are absent."""

    def why_left_out(self, keys: Keys) -> str:
        """Why there are no cells at all."""
        condition, why = next(iter(self.absent.items()))
        if self.status == NOT_FITTED:
            return f"it could not be fitted on train: {why}"
        return f"it can predict none of {len(self.absent)} conditions. For example {keys.describe(condition)}: {why}"


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
    """Cells of every baseline, and why those of others or of some conditions are missing.

    `sizes` holds the cells wanted per condition, of which there are as many as controls at most: repeated ones are too
    near to each other. `layers` holds those of predictions and of real cells. A fitted object with `can_predict` is
    asked only for the conditions it can predict.
    """
    if baselines is None or (isinstance(baselines, str) and baselines == "default" and train is None):
        return {}
    if isinstance(baselines, str):
        if baselines != "default":
            raise ValueError(f"baselines={baselines!r} is unknown. Allowed: 'default', a mapping of names, None.")
        baselines = _fit_default(train, keys, layers[1])
    cells: dict[str, Cells] = {}
    for name, baseline in baselines.items():
        if isinstance(baseline, _NotFitted):
            cells[name] = Cells(None, None, dict.fromkeys(sizes, baseline.why), NOT_FITTED)
            continue
        if isinstance(baseline, AnnData):
            cells[name] = Cells(baseline, layers[0])
            continue
        if not hasattr(baseline, "predict"):
            raise TypeError(
                f"baselines[{name!r}] must be an AnnData of cells or a fitted object with a predict method, "
                f"not {type(baseline)}."
            )
        predicted, reasons = _predict(baseline, controls, sizes, keys, seed)
        cells[name] = Cells(predicted, COUNTS, reasons)
        if predicted is not None and reasons:
            condition, why = next(iter(reasons.items()))
            logger.info(
                "Baseline %r can predict %d of %d conditions. For example %s: %s",
                name, len(sizes) - len(reasons), len(sizes), keys.describe(condition), why,
            )  # fmt: skip
    for name, found in cells.items():
        if found.adata is None:
            logger.warning("Baseline %r has no values: %s", name, found.why_left_out(keys))
    return cells


class _NotFitted(NamedTuple):
    """In place of a rule."""

    why: str


def _fit_default(train: Any, keys: Keys, layer: str | None) -> dict[str, Any]:
    """The rules for every kind of split, fitted, or why they could not be."""
    labels = keys.labels
    if labels.control is None:
        raise ValueError(
            "The default baselines need the label of the control cells in train: pass control as a label, fitted "
            "baselines, or baselines=None."
        )
    from scperturbdiff.evaluation.baselines import default_baselines

    fitted: dict[str, Any] = {}
    for name, baseline in {**default_baselines("pairs"), **default_baselines("combinations")}.items():
        try:
            fitted[name] = baseline.fit(
                train,
                perturbation_key=labels.key,
                control=labels.control,
                context_keys=list(keys.contexts),
                layer=layer,
                dose_key=labels.dose_key,
                separator=labels.separator,
            )
        except (KeyError, ValueError) as error:
            fitted[name] = _NotFitted(str(error.args[0]))
    return fitted


def _predict(
    baseline: Any, controls: Controls, sizes: Mapping[Condition, int], keys: Keys, seed: int
) -> tuple[AnnData | None, dict[Condition, str]]:
    """What a fitted object predicts, context by context (`None` for nothing), and why not other conditions."""
    from scperturbdiff.evaluation.baselines import Baseline

    reasons: dict[Condition, str] = {}
    per_context: dict[Condition, list[Condition]] = {}
    for condition in sizes:
        context, why = keys.context(condition), None
        if isinstance(baseline, Baseline):
            why = baseline.why_not(condition[-1], context)
        elif hasattr(baseline, "can_predict") and not baseline.can_predict(condition[-1], context):
            why = "its can_predict says so."
        if why is None:
            per_context.setdefault(context, []).append(condition)
        else:
            reasons[condition] = why
    parts = []
    for context, conditions in per_context.items():
        cells = controls.adata[controls.rows[context]]
        cells = cells.to_memory() if cells.isbacked else cells.copy()
        number = [min(sizes[condition], cells.n_obs) for condition in conditions]
        wanted: Any = [condition[-1] for condition in conditions]
        if keys.conditions or isinstance(baseline, Baseline):
            columns = [*keys.conditions, keys.labels.key]
            wanted = pd.DataFrame([c[len(context) :] for c in conditions], columns=columns)
        if isinstance(baseline, Baseline):
            wanted[N_CELLS] = number
        parts.append(baseline.predict(cells, wanted, n_cells=max(number), seed=seed))
    return (ad.concat(parts, index_unique="-", merge="same") if parts else None), reasons
