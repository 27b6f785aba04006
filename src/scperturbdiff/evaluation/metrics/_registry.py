"""The table of metrics: name, which direction is better, range, and the public function behind each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from scperturbdiff.evaluation.metrics import _distances as distances
from scperturbdiff.evaluation.metrics import _expression as expression
from scperturbdiff.evaluation.metrics import _shifts as shifts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from scperturbdiff.evaluation.metrics._inputs import Comparison


@dataclass(frozen=True)
class Metric:
    """One metric of a condition.

    Parameters
    ----------
    name, description
        As in the tables, and one line on it.
    better, low, high
        `"higher"`, `"lower"`, or `"one"` when 1 is best; range of the values.
    function, compute
        The public function that defines it, and the value for one condition; `None` for a metric of all perturbations
        of a context together.
    of_means
        Whether mean expression is all that it needs of the predicted cells.
    undefined
        Where it has no value although there are cells.
    """

    name: str
    better: Literal["higher", "lower", "one"]
    low: float
    high: float
    function: Callable[..., Any]
    compute: Callable[[Comparison], float] | None
    description: str
    of_means: bool = False
    undefined: str = ""

    def cost(self, values: Any) -> Any:
        """Values turned so that less is better: negated, as they are, or the distance from 1 (`"one"`)."""
        values = np.asarray(values, dtype=np.float64)
        if self.better == "one":
            return np.abs(values - 1)
        return values if self.better == "lower" else -values


def _on_top(function: Callable[..., float], c: Comparison, *matrices: Any) -> float:
    return function(*matrices, genes=c.top) if len(c.top) else float("nan")


_INF = float("inf")
_FEW = "fewer than two cells on a side"
_ALIKE = "all genes have the same shift, as where nothing changes"
_NOT_SIGNIFICANT = "no gene is significant in the real cells"
_ONE_CLASS = "no gene, or every gene, is significant in the real cells"
METRICS: dict[str, Metric] = {metric.name: metric for metric in (
    Metric("energy_distance", "lower", -_INF, _INF, distances.energy_distance,
           lambda c: distances.energy_distance(*c.pcs),
           "Energy distance (U-statistic) in principal components of real cells", undefined=_FEW),
    Metric("mmd", "lower", -2, 2, distances.mmd,
           lambda c: distances.mmd(*c.pcs, bandwidth=c.observed.projection.bandwidth),
           "Squared MMD (U-statistic), Gaussian kernel, bandwidth fixed on real cells, in principal components",
           undefined=_FEW),
    Metric("sliced_wasserstein", "lower", 0, _INF, distances.sliced_wasserstein,
           lambda c: distances.sliced_wasserstein(*c.pcs, seed=c.observed.seed),
           "Sliced 2-Wasserstein distance in principal components of real cells", undefined="no cells on a side"),
    Metric("pearson_delta", "higher", -1, 1, shifts.pearson_delta,
           lambda c: shifts.pearson_delta(*c.means),
           "Pearson correlation of predicted and observed mean shift, all genes", of_means=True, undefined=_ALIKE),
    Metric("pearson_delta_top", "higher", -1, 1, shifts.pearson_delta,
           lambda c: _on_top(shifts.pearson_delta, c, *c.means),
           "Pearson correlation of the mean shift, top differentially expressed genes",
           of_means=True, undefined=_ALIKE),
    Metric("r2_delta", "higher", -_INF, 1, shifts.r2_delta, lambda c: shifts.r2_delta(*c.means),
           "R2 of the mean shift, all genes", of_means=True, undefined=_ALIKE),
    Metric("mse_mean", "lower", 0, _INF, shifts.mse_mean, lambda c: shifts.mse_mean(*c.means[:2]),
           "Mean squared error of log-normalised gene means", of_means=True, undefined="no cells on a side"),
    Metric("sd_ratio", "one", 0, _INF, shifts.sd_ratio, lambda c: _on_top(shifts.sd_ratio, c, c.pred, c.real),
           "Median predicted over real s.d. across cells, top differentially expressed genes", undefined=_FEW),
    Metric("correlation_distance", "lower", -4, 4, shifts.correlation_distance,
           lambda c: _on_top(partial(shifts.correlation_distance, seed=c.observed.seed), c, c.pred, c.real),
           "Mean squared difference of gene-gene correlations (unbiased), top differentially expressed genes",
           undefined="fewer than six cells on a side, or no gene varies"),
    Metric("de_overlap", "higher", 0, 1, expression.de_overlap,
           lambda c: expression.de_overlap(*c.tests, k=c.observed.n_top),
           "Share of the top differentially expressed genes found among the predicted top ones",
           undefined="n_top is not less than the number of genes, or fewer than two cells on a side"),
    Metric("de_precision", "higher", 0, 1, expression.de_precision, lambda c: expression.de_precision(*c.tests),
           "Share of the genes called in predicted cells that are significant in real cells",
           undefined="no gene is significant in the predicted cells"),
    Metric("de_recall", "higher", 0, 1, expression.de_recall, lambda c: expression.de_recall(*c.tests),
           "Share of the genes significant in real cells that are called in predicted cells",
           undefined=_NOT_SIGNIFICANT),
    Metric("de_direction", "higher", 0, 1, expression.de_direction, lambda c: expression.de_direction(*c.tests),
           "Agreement in sign on the genes significant in real cells", undefined=_NOT_SIGNIFICANT),
    Metric("de_auprc", "higher", 0, 1, expression.de_auprc, lambda c: expression.de_auprc(*c.tests),
           "Average precision of the predicted score for the genes significant in real cells", undefined=_ONE_CLASS),
    Metric("de_auroc", "higher", 0, 1, expression.de_auroc, lambda c: expression.de_auroc(*c.tests),
           "Area under the ROC curve for the genes significant in real cells", undefined=_ONE_CLASS),
    *(
        Metric(f"discrimination_{kind}", "higher", 0, 1, shifts.perturbation_discrimination, None,
               f"Rank of the true perturbation among all of the context by {kind} distance of mean shifts",
               of_means=True, undefined="one perturbation in this context, or no shift at all")
        for kind in ("l1", "l2", "cosine")
    ),
)}  # fmt: skip
"""All metrics by name, in the order of the tables."""
DEFAULT_METRICS = ("energy_distance", "pearson_delta", "mse_mean", "de_auprc", "discrimination_l2")
"""Computed unless others are asked for: population, direction and size of the shift, genes, and telling apart."""
ALL = "all"


def metric_table() -> pd.DataFrame:
    """All metrics, indexed by name.

    Returns
    -------
    Columns: `better`, which direction is; `low` and `high`, the range; `function` that defines it; `description`;
    `of_means`, whether predicted means are enough; `undefined`, where it has no value; `default`, whether
    :func:`~scperturbdiff.evaluate` computes it unless asked for others.
    """
    table = pd.DataFrame(map(vars, METRICS.values())).set_index("name").rename_axis("metric")
    table["function"] = [f"{f.__module__}.{f.__name__}" for f in table["function"]]
    table["default"] = table.index.isin(DEFAULT_METRICS)
    return table.drop(columns="compute")


def choose_metrics(names: Iterable[str] | None) -> list[Metric]:
    """The metrics called `names` in the order of the table; `None`: the default ones; `"all"`: all.

    Unknown names raise a `ValueError`.
    """
    if names is None:
        names = DEFAULT_METRICS
    names = list(METRICS) if names == ALL else [names] if isinstance(names, str) else list(names)
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        raise ValueError(f"Unknown metrics: {unknown}. Allowed: {', '.join(METRICS)}; or {ALL!r}.")
    return [metric for name, metric in METRICS.items() if name in names]
