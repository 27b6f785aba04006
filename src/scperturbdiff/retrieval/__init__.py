"""Retrieval: what a perturbation did elsewhere, and what others did here. Arrays only, no AnnData, no networks."""

from scperturbdiff.retrieval._by_state import StateRetrieval, state_responses
from scperturbdiff.retrieval._conditions import Conditions, Novelty
from scperturbdiff.retrieval._doubt import variance_of_errors
from scperturbdiff.retrieval._folds import FoldEvidence
from scperturbdiff.retrieval._own_gene import OwnGene
from scperturbdiff.retrieval._responses import Responses, Retrieved
from scperturbdiff.retrieval._responsiveness import draw_factors, factors_along, responsiveness_law
from scperturbdiff.retrieval._retrieval import NEW, Retrieval, whole_perturbations
from scperturbdiff.retrieval._settings import RetrievalSettings
from scperturbdiff.retrieval._states import States, control_moments, match_states

__all__ = [
    "NEW",
    "Conditions",
    "FoldEvidence",
    "Novelty",
    "OwnGene",
    "Responses",
    "Retrieval",
    "RetrievalSettings",
    "Retrieved",
    "StateRetrieval",
    "States",
    "control_moments",
    "draw_factors",
    "factors_along",
    "match_states",
    "responsiveness_law",
    "state_responses",
    "variance_of_errors",
    "whole_perturbations",
]
