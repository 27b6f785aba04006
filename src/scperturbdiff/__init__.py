"""Predict how populations of single cells respond to a perturbation."""

from importlib.metadata import version

from scperturbdiff import datasets
from scperturbdiff.evaluation import baselines, evaluate, metrics, pl, splits, summarize_evaluation
from scperturbdiff.model import PerturbDiff
from scperturbdiff.prediction._summary import summarize_populations

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
