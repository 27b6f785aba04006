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
    """

    name: str
    better: Literal["higher", "lower", "one"]
    low: float
    high: float
    function: Callable[..., Any]
    compute: Callable[[Comparison], float] | None
    description: str

    def cost(self, values: Any) -> Any:
        """Values turned so that less is better: negated, as they are, or the distance from 1 (`"one"`)."""
        values = np.asarray(values, dtype=np.float64)
        if self.better == "one":
            return np.abs(values - 1)
        return values if self.better == "lower" else -values


def _on_top(function: Callable[..., float], c: Comparison, *matrices: Any) -> float:
    return function(*matrices, genes=c.top) if len(c.top) else float("nan")


_INF = float("inf")
METRICS: dict[str, Metric] = {metric.name: metric for metric in (
    Metric("energy_distance", "lower", -_INF, _INF, distances.energy_distance,
           lambda c: distances.energy_distance(*c.pcs),
           "Energy distance (U-statistic) in principal components of real cells"),
    Metric("mmd", "lower", -2, 2, distances.mmd,
           lambda c: distances.mmd(*c.pcs, bandwidth=c.observed.projection.bandwidth),
           "Squared MMD (U-statistic), Gaussian kernel, bandwidth fixed on real cells, in principal components"),
    Metric("sliced_wasserstein", "lower", 0, _INF, distances.sliced_wasserstein,
           lambda c: distances.sliced_wasserstein(*c.pcs, seed=c.observed.seed),
           "Sliced 2-Wasserstein distance in principal components of real cells"),
    Metric("pearson_delta", "higher", -1, 1, shifts.pearson_delta,
           lambda c: shifts.pearson_delta(c.pred, c.real, c.control),
           "Pearson correlation of predicted and observed mean shift, all genes"),
    Metric("pearson_delta_top", "higher", -1, 1, shifts.pearson_delta,
           lambda c: _on_top(shifts.pearson_delta, c, c.pred, c.real, c.control),
           "Pearson correlation of the mean shift, top differentially expressed genes"),
    Metric("r2_delta", "higher", -_INF, 1, shifts.r2_delta, lambda c: shifts.r2_delta(c.pred, c.real, c.control),
           "R2 of the mean shift, all genes"),
    Metric("mse_mean", "lower", 0, _INF, shifts.mse_mean, lambda c: shifts.mse_mean(c.pred, c.real),
           "Mean squared error of log-normalised gene means"),
    Metric("sd_ratio", "one", 0, _INF, shifts.sd_ratio, lambda c: _on_top(shifts.sd_ratio, c, c.pred, c.real),
           "Median predicted over real s.d. across cells, top differentially expressed genes"),
    Metric("correlation_distance", "lower", -4, 4, shifts.correlation_distance,
           lambda c: _on_top(partial(shifts.correlation_distance, seed=c.observed.seed), c, c.pred, c.real),
           "Mean squared difference of gene-gene correlations (unbiased), top differentially expressed genes"),
    Metric("de_overlap", "higher", 0, 1, expression.de_overlap,
           lambda c: expression.de_overlap(*c.tests, k=c.observed.n_top),
           "Share of the top differentially expressed genes found among the predicted top ones"),
    Metric("de_precision", "higher", 0, 1, expression.de_precision, lambda c: expression.de_precision(*c.tests),
           "Share of the genes called in predicted cells that are significant in real cells"),
    Metric("de_recall", "higher", 0, 1, expression.de_recall, lambda c: expression.de_recall(*c.tests),
           "Share of the genes significant in real cells that are called in predicted cells"),
    Metric("de_direction", "higher", 0, 1, expression.de_direction, lambda c: expression.de_direction(*c.tests),
           "Agreement in sign on the genes significant in real cells"),
    Metric("de_auprc", "higher", 0, 1, expression.de_auprc, lambda c: expression.de_auprc(*c.tests),
           "Average precision of the predicted score for the genes significant in real cells"),
    Metric("de_auroc", "higher", 0, 1, expression.de_auroc, lambda c: expression.de_auroc(*c.tests),
           "Area under the ROC curve for the genes significant in real cells"),
    *(
        Metric(f"discrimination_{kind}", "higher", 0, 1, shifts.perturbation_discrimination, None,
               f"Rank of the true perturbation among all of the context by {kind} distance of mean shifts")
        for kind in ("l1", "l2", "cosine")
    ),
)}  # fmt: skip
"""All metrics by name, in the order of the tables."""


def metric_table() -> pd.DataFrame:
    """All metrics: which direction is better, range, defining function and a description, indexed by name."""
    table = pd.DataFrame(map(vars, METRICS.values())).set_index("name").rename_axis("metric")
    table["function"] = [f"{f.__module__}.{f.__name__}" for f in table["function"]]
    return table.drop(columns="compute")


def choose_metrics(names: Iterable[str] | None) -> list[Metric]:
    """The metrics called `names` in the order of the table; `None`: all. Unknown names raise a `ValueError`."""
    names = list(METRICS) if names is None else [names] if isinstance(names, str) else list(names)
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        raise ValueError(f"Unknown metrics: {unknown}. Allowed: {', '.join(METRICS)}.")
    return [metric for name, metric in METRICS.items() if name in names]
