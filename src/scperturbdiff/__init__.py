"""Predict how populations of single cells respond to a perturbation."""

from importlib.metadata import version

from scperturbdiff import baselines, datasets, metrics, pl, splits
from scperturbdiff._model import PerturbDiff
from scperturbdiff.metrics.evaluate import evaluate
from scperturbdiff.metrics.summary import summarize_evaluation
from scperturbdiff.prediction.summary import summarize_populations

__version__ = version("scperturbdiff")

__all__ = [
    "PerturbDiff",
    "baselines",
    "datasets",
    "evaluate",
    "metrics",
    "pl",
    "splits",
    "summarize_evaluation",
    "summarize_populations",
]
