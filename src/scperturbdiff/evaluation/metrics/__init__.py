"""Measures of how well predicted cells match real ones, each a function that can be called alone."""

from scperturbdiff.evaluation.metrics._cell_eval import cell_eval, to_cell_eval
from scperturbdiff.evaluation.metrics._distances import (
    energy_distance,
    median_bandwidth,
    mmd,
    sliced_wasserstein,
    subsample,
)
from scperturbdiff.evaluation.metrics._evaluate import evaluate
from scperturbdiff.evaluation.metrics._expression import (
    de_auprc,
    de_auroc,
    de_direction,
    de_overlap,
    de_precision,
    de_recall,
    rank_genes,
    top_genes,
)
from scperturbdiff.evaluation.metrics._inputs import Comparison, Projection, read_expression
from scperturbdiff.evaluation.metrics._registry import METRICS, Metric, metric_table
from scperturbdiff.evaluation.metrics._shifts import (
    correlation_distance,
    gene_moments,
    mean_shift,
    mse_mean,
    pearson,
    pearson_delta,
    perturbation_discrimination,
    r2_delta,
    sd_ratio,
)
from scperturbdiff.evaluation.metrics._summary import summarize_evaluation

__all__ = [
    "METRICS",
    "Comparison",
    "Projection",
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
    "gene_moments",
    "evaluate",
    "mean_shift",
    "median_bandwidth",
    "metric_table",
    "mmd",
    "mse_mean",
    "pearson",
    "pearson_delta",
    "perturbation_discrimination",
    "r2_delta",
    "rank_genes",
    "read_expression",
    "sd_ratio",
    "sliced_wasserstein",
    "subsample",
    "summarize_evaluation",
    "to_cell_eval",
    "top_genes",
]
