"""Figures of predictions beside real cells; each function returns matplotlib Axes and draws into `ax` if given."""

from scperturbdiff.evaluation.pl._cells import COLORS as COLORS  # this and the next two for reports
from scperturbdiff.evaluation.pl._cells import scatter_groups as scatter_groups
from scperturbdiff.evaluation.pl._cells import scatter_shifts as scatter_shifts
from scperturbdiff.evaluation.pl._doses import dose_response
from scperturbdiff.evaluation.pl._figures import draws, mean_shift, populations, scores, violins
from scperturbdiff.evaluation.pl._similarity import similarity
from scperturbdiff.evaluation.pl._states import states

__all__ = ["dose_response", "draws", "mean_shift", "populations", "scores", "similarity", "states", "violins"]
