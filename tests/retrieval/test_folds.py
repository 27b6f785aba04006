"""Evidence for fold changes: how far conditions follow them."""

from __future__ import annotations

import numpy as np
import pytest

from scperturbdiff.retrieval import FoldEvidence, RetrievalSettings
from scperturbdiff.retrieval._folds import usual_weight

SETTINGS = RetrievalSettings()


def evidence(agrees: float, n: int = 32) -> FoldEvidence:
    """Conditions at distance 2, which lie this far along the way from decoded shifts to fold changes."""
    return FoldEvidence(np.full(n, 2.0), np.full(n, agrees), np.ones(n))


@pytest.mark.parametrize("agrees", [-1.0, 0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(("distance", "wanted"), [(0.0, 0.5), (1000.0, 1.0)])
def test_far_from_all_evidence_the_weight_is_the_usual_one(agrees: float, distance: float, wanted: float) -> None:
    """Half of each nearby, fold changes far away."""
    assert evidence(agrees).weight(distance, SETTINGS) == pytest.approx(wanted, abs=0.01)


def test_the_usual_weight_rises_with_distance() -> None:
    weights = [usual_weight(distance, SETTINGS) for distance in (0.0, 1.0, SETTINGS.fold_far, 10.0, 1e6)]
    assert weights[0] == 0.5 and weights[2] == pytest.approx(0.75) and weights[-1] == pytest.approx(1)
    assert (np.diff(weights) > 0).all()


@pytest.mark.parametrize(("agrees", "wanted"), [(1.0, 1), (3.0, 1), (0.5, 0.5), (0.0, 0), (-1.0, 0)])
def test_near_evidence_it_decides(agrees: float, wanted: float) -> None:
    """A regression through the origin, in [0, 1]; one more condition says the usual weight."""
    assert evidence(agrees, 1000).weight(2.0, SETTINGS) == pytest.approx(wanted, abs=2e-3)
    few = evidence(agrees, 1).weight(2.0, SETTINGS)
    assert few == pytest.approx(np.clip((agrees + usual_weight(2.0, SETTINGS)) / 2, 0, 1))


def test_the_weight_rises_with_what_speaks_for_it() -> None:
    weights = [evidence(agrees).weight(2.5, SETTINGS) for agrees in np.linspace(-1, 2, 13)]
    assert (np.diff(weights) >= 0).all() and weights[0] < weights[-1]


def test_fold_changes_that_make_no_difference_are_followed() -> None:
    assert 0 <= FoldEvidence(np.ones(3), np.zeros(3), np.zeros(3)).weight(1.0, SETTINGS) <= 1
