"""Counts of generated cells."""

from scperturbdiff.counts._fold import PER_CELL, MovedMeans
from scperturbdiff.counts._move import move_counts, scale_response, thin
from scperturbdiff.counts._respond import Decoded, respond
from scperturbdiff.counts._sampling import EPS, positions

__all__ = [
    "EPS",
    "PER_CELL",
    "Decoded",
    "MovedMeans",
    "move_counts",
    "positions",
    "respond",
    "scale_response",
    "thin",
]
