"""Data to try things on: a simulated perturbation screen whose truth is known."""

from scperturbdiff.datasets._simulate import simulate
from scperturbdiff.datasets._truth import true_log_fold_change

__all__ = ["simulate", "true_log_fold_change"]
