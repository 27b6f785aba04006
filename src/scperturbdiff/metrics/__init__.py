"""Measures of how well predicted cells match real ones, each a function that can be called alone."""

from scperturbdiff.metrics.cell_eval import cell_eval, to_cell_eval
from scperturbdiff.metrics.distances import energy_distance, median_bandwidth, mmd, sliced_wasserstein
from scperturbdiff.metrics.evaluate import evaluate
from scperturbdiff.metrics.expression import (
    de_auprc,
    de_auroc,
    de_direction,
    de_overlap,
    de_precision,
    de_recall,
    rank_genes,
    top_genes,
)
from scperturbdiff.metrics.registry import METRICS, Metric, metric_table
from scperturbdiff.metrics.shifts import (
    correlation_distance,
    mean_shift,
    mse_mean,
    pearson_delta,
    perturbation_discrimination,
    r2_delta,
    sd_ratio,
)
from scperturbdiff.metrics.summary import summarize_evaluation

__all__ = [
    "METRICS",
    "Metric",
    "cell_eval",
    "correlation_distance",
    "de_auprc",
    "de_auroc",
    "de_direction",
    "de_overlap",
    "de_precision",
    "de_recall",
    "energy_distance",
    "evaluate",
    "mean_shift",
    "median_bandwidth",
    "metric_table",
    "mmd",
    "mse_mean",
    "pearson_delta",
    "perturbation_discrimination",
    "r2_delta",
    "rank_genes",
    "sd_ratio",
    "sliced_wasserstein",
    "summarize_evaluation",
    "to_cell_eval",
    "top_genes",
]
