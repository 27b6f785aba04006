"""A prediction, its scores and its evidence as one page, which opens without a network."""

from scperturbdiff.reporting._page import Report
from scperturbdiff.reporting._page import check_path as check_path  # for the command
from scperturbdiff.reporting._report import report

__all__ = ["Report", "report"]
