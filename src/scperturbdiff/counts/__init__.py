"""Counts of generated cells."""

from scperturbdiff.counts._move import move_counts
from scperturbdiff.counts._sampling import positions

__all__ = ["move_counts", "positions"]
