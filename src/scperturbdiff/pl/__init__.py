"""Figures of predictions beside real cells; each function returns matplotlib Axes and draws into `ax` if given."""

from scperturbdiff.pl._expression import mean_shift, violins
from scperturbdiff.pl._populations import draws, populations
from scperturbdiff.pl._scores import scores

__all__ = ["draws", "mean_shift", "populations", "scores", "violins"]
