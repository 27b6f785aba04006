"""Measures of how well predicted cells match real ones, each a function that can be called alone."""

from scperturbdiff.evaluation.metrics._cell_eval import cell_eval, to_cell_eval
from scperturbdiff.evaluation.metrics._distances import energy_distance, median_bandwidth, mmd, sliced_wasserstein
from scperturbdiff.evaluation.metrics._distances import subsample as subsample
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
from scperturbdiff.evaluation.metrics._inputs import Comparison
from scperturbdiff.evaluation.metrics._inputs import Keys as Keys  # this and what follows for figures and reports
from scperturbdiff.evaluation.metrics._inputs import Projection as Projection
from scperturbdiff.evaluation.metrics._inputs import find_dose as find_dose
from scperturbdiff.evaluation.metrics._inputs import group_cells as group_cells
from scperturbdiff.evaluation.metrics._inputs import group_contexts as group_contexts
from scperturbdiff.evaluation.metrics._inputs import make_keys as make_keys
from scperturbdiff.evaluation.metrics._inputs import read_expression as read_expression
from scperturbdiff.evaluation.metrics._inputs import split_control as split_control
from scperturbdiff.evaluation.metrics._predicted import read_predicted as read_predicted
from scperturbdiff.evaluation.metrics._registry import DEFAULT_METRICS as DEFAULT_METRICS
from scperturbdiff.evaluation.metrics._registry import METRICS, Metric, metric_table
from scperturbdiff.evaluation.metrics._shifts import (
    correlation_distance,
    mean_shift,
    mse_mean,
    pearson_delta,
    perturbation_discrimination,
    r2_delta,
    sd_ratio,
)
from scperturbdiff.evaluation.metrics._shifts import gene_moments as gene_moments
from scperturbdiff.evaluation.metrics._shifts import pearson as pearson
from scperturbdiff.evaluation.metrics._summary import summarize_evaluation

__all__ = [
    "METRICS", "Comparison", "Metric", "cell_eval", "correlation_distance", "de_auprc", "de_auroc", "de_direction",
    "de_overlap", "de_precision", "de_recall", "energy_distance", "evaluate", "mean_shift", "median_bandwidth",
    "metric_table", "mmd", "mse_mean", "pearson_delta", "perturbation_discrimination", "r2_delta", "rank_genes",
    "sd_ratio", "sliced_wasserstein", "summarize_evaluation", "to_cell_eval", "top_genes",
]  # fmt: skip
