"""The rows of an evaluation: values of one model, and why some are missing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scperturbdiff.evaluation.metrics._baseline_cells import OK, UNAVAILABLE, UNDEFINED, Cells
from scperturbdiff.evaluation.metrics._shifts import perturbation_discrimination
from scperturbdiff.evaluation.metrics._summary import finite_mean

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from scperturbdiff.evaluation.metrics._inputs import Comparison, Condition, Keys
    from scperturbdiff.evaluation.metrics._registry import Metric

NEEDS_CELLS = "the metric needs cells, and means were given"
COMPLETE = Cells(None, None)
"""What nothing is missing of."""


def score(
    name: str,
    role: str,
    pairs: Iterable[tuple[Condition, Comparison]],
    chosen: Sequence[Metric],
    keys: Keys,
    found: Cells = COMPLETE,
    means: bool = False,
) -> pd.DataFrame:
    """Table of one model: metrics of single conditions, then those that compare the perturbations of a context.

    `found` says which conditions are missing, and why; `means`, whether there are means instead of cells.
    """
    rows: list[dict[str, Any]] = []
    together = [metric for metric in chosen if metric.compute is None]
    shifts: dict[Condition, list[tuple[dict[str, Any], Any, Any]]] = {}
    numbers: dict[str, int] = {}

    def add(base: dict[str, Any], metric: Metric, value: float) -> None:
        status, reason = OK, ""
        if base["condition"] in found.absent:
            value, status, reason = float("nan"), found.status, found.absent[base["condition"]]
        elif means and not metric.of_means:
            value, status, reason = float("nan"), UNAVAILABLE, NEEDS_CELLS
        elif np.isnan(value):
            status, reason = UNDEFINED, metric.undefined
        rows.append({**base, "metric": metric.name, "value": float(value), "status": status, "reason": reason})

    for condition, pair in pairs:
        numbers = {"n_pred": pair.pred.shape[0], "n_real": pair.real.shape[0], "n_control": pair.control.shape[0]}
        base = {"model": name, "role": role, "condition": condition, **numbers}
        for metric in chosen:
            if metric.compute is not None:
                possible = condition not in found.absent and (metric.of_means or not means)
                add(base, metric, metric.compute(pair) if possible else float("nan"))
        if together:
            predicted, observed, control = (mean[0] for mean in pair.means)
            shifts.setdefault(keys.context(condition), []).append((base, predicted - control, observed - control))
    for members in shifts.values():
        bases, of_predicted, of_real = zip(*members, strict=True)
        for metric in together:
            kind: Any = metric.name.rpartition("_")[2]
            values = perturbation_discrimination(of_predicted, of_real, metric=kind)
            for base, value in zip(bases, values, strict=True):
                add(base, metric, value)
    table: Any = pd.DataFrame(rows)
    parts = pd.DataFrame(table.pop("condition").tolist(), columns=list(keys.all))
    values = table[["metric", "value", "status", "reason", *numbers]]
    return pd.concat([table[["model", "role"]], parts, values], axis=1)


def average_tables(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Mean of the values of tables with the same rows, over those that have one."""
    first, value = tables[0], finite_mean(np.array([table["value"] for table in tables]), axis=0)
    there = np.isfinite(value)
    return first.assign(value=value, status=first["status"].where(~there, OK), reason=first["reason"].where(~there, ""))
