"""Retrieval: what a perturbation did elsewhere, and what others did here. Arrays only, no AnnData, no networks."""

from scperturbdiff.retrieval._conditions import Conditions, Novelty
from scperturbdiff.retrieval._responses import Responses, Retrieved
from scperturbdiff.retrieval._retrieval import Retrieval
from scperturbdiff.retrieval._settings import RetrievalSettings

__all__ = ["Conditions", "Novelty", "Responses", "Retrieval", "RetrievalSettings", "Retrieved"]
