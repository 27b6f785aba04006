"""Retrieval: what a perturbation did elsewhere, and what others did here (kriging over conditions)."""

from scperturbdiff.retrieval._conditions import Conditions, Novelty
from scperturbdiff.retrieval._retrieval import AnchorPrediction, ResponseAnchor

__all__ = ["AnchorPrediction", "Conditions", "Novelty", "ResponseAnchor"]
