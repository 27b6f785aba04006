"""Counts of generated cells."""

from scperturbdiff.counts._move import move_counts
from scperturbdiff.counts._sampling import EPS, positions

__all__ = ["EPS", "move_counts", "positions"]
