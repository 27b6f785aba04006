"""The constants of retrieval, in one place and saved with the model."""

from __future__ import annotations

from dataclasses import dataclass

from scperturbdiff.arguments import check_int, check_number, check_type, refusal
from scperturbdiff.retrieval._conditions import SITES


@dataclass(frozen=True)
class RetrievalSettings:
    """How responses are retrieved.

    Attributes
    ----------
    mean_variance
        Prior variance of a perturbation's mean response over contexts, relative to that of responses: practically flat.
    min_contexts_for_length
        Contexts without which lengths of predictions are left as they are.
    n_states
        Numbers of states of cells that are tried beside one.
    state_softness
        Variance with which cells belong to the states around them, in units of that within states.
    state_steps
        Steps of matching treated cells to states.
    state_balance
        How firmly states keep their share of cells in treated populations, in [0, 1]: 1 is balanced transport.
    state_prior_cells
        Cells with the shift of the whole population that are added to each state.
    fold_prior
        Conditions for which it counts how far effects usually are carried over as fold changes.
    fold_far
        Distance from known contexts, in standard deviations of cells, at which that is half the way from .5 to 1.
    fold_width
        How alike distances to known contexts must be for conditions to count, on the log scale.
    doubt_factors, doubt_prior, doubt_min
        Directions in which predictions may be off; conditions for which the directions of responses count; conditions
        that must have been left out.
    n_neighbors
        Training conditions that a prediction uses at most.
    n_left_out
        Training conditions that are left out in turn, at most, when parameters are chosen.
    length_bounds
        Least and largest factor on the length of a shift predicted for a new context.
    n_folds
        Folds in which pairs are left out to decide how far learned similarities are used.
    n_factors
        Factors of the learned similarity of perturbations.
    em_steps
        Steps of expectation-maximisation.
    em_components
        Perturbations that contexts are compared on, at most.
    max_contexts
        Similarities are not learned from more contexts than this.
    context_prior_weight
        Weight of the prior covariance of contexts, in perturbations.
    prior_context_share
        Share of responses that depends on the context, at least, in that prior.
    max_dose_levels
        More different doses are grouped by quantiles.
    dose_prior_weight
        Weight of "all doses act alike", in perturbations of average strength.
    feature_min_act
        Perturbations that must act before features can be found to tell nothing.
    own_gene_min, own_gene_share
        Targets whose own gene must be measured, and the share of them whose gene must clearly change in the same
        direction, before that is expected of a target never seen.
    """

    mean_variance: float = 100.0
    min_contexts_for_length: int = 4
    n_states: tuple[int, ...] = (2, 4, 8)
    state_softness: float = 2.0
    state_steps: int = 15
    state_balance: float = 0.5
    state_prior_cells: float = 2.0
    fold_prior: float = 1.0
    fold_far: float = 3.0
    fold_width: float = 0.25
    doubt_factors: int = 16
    doubt_prior: float = 4.0
    doubt_min: int = 3
    n_neighbors: int = 192
    n_left_out: int = 256
    length_bounds: tuple[float, float] = (0.5, 1.5)
    n_folds: int = 5
    n_factors: int = 16
    em_steps: int = 20
    em_components: int = 256
    max_contexts: int = 128
    context_prior_weight: float = 2.0
    prior_context_share: float = 0.3
    max_dose_levels: int = 16
    dose_prior_weight: float = 0.1
    feature_min_act: int = 10
    own_gene_min: int = 4
    own_gene_share: float = 0.75

    def __post_init__(self) -> None:
        for name in ("n_states", "length_bounds"):
            check_type(name, getattr(self, name), tuple | list, "several numbers")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for n_states in self.n_states:
            check_int("n_states", n_states, 2, SITES)
        if len(self.length_bounds) != 2:
            raise refusal("length_bounds", self.length_bounds, "two numbers")
        for bound in self.length_bounds:
            check_number("length_bounds", bound, "[0, inf)")
        for name, least in LEAST.items():
            check_int(name, getattr(self, name), least)
        for name, allowed in ALLOWED.items():
            check_number(name, getattr(self, name), allowed)


LEAST = {
    "min_contexts_for_length": 0,
    "state_steps": 0,
    "doubt_factors": 0,
    "doubt_min": 2,
    "n_neighbors": 1,
    "n_left_out": 1,
    "n_folds": 2,
    "n_factors": 0,
    "em_steps": 0,
    "em_components": 1,
    "max_contexts": 0,
    "max_dose_levels": 1,
    "feature_min_act": 1,
    "own_gene_min": 1,
}
"""Whole numbers among the settings, and the least of each."""
ALLOWED = {
    "mean_variance": "(0, inf)",
    "state_softness": "(0, inf)",
    "state_balance": "[0, 1]",
    "state_prior_cells": "[0, inf)",
    "fold_prior": "[0, inf)",
    "fold_far": "(0, inf)",
    "fold_width": "(0, inf)",
    "doubt_prior": "[0, inf)",
    "context_prior_weight": "[0, inf)",
    "prior_context_share": "[0, inf)",
    "dose_prior_weight": "[0, inf)",
    "own_gene_share": "[0, 1]",
}
"""Other numbers, and the interval of each."""
