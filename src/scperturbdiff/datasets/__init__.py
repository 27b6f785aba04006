"""Data to try things on: published screens, and a simulated one whose truth is known."""

from scperturbdiff.datasets._published import kang_2018, norman_2019, papalexi_2021
from scperturbdiff.datasets._simulate import simulate
from scperturbdiff.datasets._truth import true_log_fold_change

__all__ = ["kang_2018", "norman_2019", "papalexi_2021", "simulate", "true_log_fold_change"]
