"""The target's own gene: learned from targets that agree, off where they do not."""

from __future__ import annotations

import numpy as np
import pytest

from scperturbdiff.retrieval import OwnGene, RetrievalSettings
from scperturbdiff.retrieval._own_gene import random_effects

FALLS = np.array([-0.4, -2.0, -2.2, -0.8, -0.5])


def test_moments_are_those_of_equally_well_measured_targets() -> None:
    """Closed form: mean, and variance less that of the noise."""
    mean, spread = random_effects(FALLS, np.full(5, 0.3))
    assert mean == pytest.approx(FALLS.mean())
    assert spread == pytest.approx(np.sqrt(FALLS.var() - 0.3**2), rel=1e-3)
    assert random_effects(np.array([-1.0, -1.0]), np.array([0.1, 0.2])) == pytest.approx((-1.0, 0.0), abs=1e-6)


def test_badly_measured_targets_count_for_less() -> None:
    mean, _ = random_effects(np.array([-1.0, -1.1, 5.0]), np.array([0.05, 0.05, 20.0]))
    assert mean == pytest.approx(-1.05, abs=0.02)


@pytest.mark.parametrize("sign", [-1, 1])
def test_targets_that_agree_are_followed(sign: int) -> None:
    found = OwnGene.of(-sign * FALLS, np.full(5, 0.05))
    assert found.used and found.n_targets == found.n_clear == 5
    assert np.sign(found.fold) == sign and found.spread > 0.5
    assert ("rises" if sign > 0 else "falls") in str(found) and "5 of 5 targets" in str(found)


@pytest.mark.parametrize(
    ("fold", "error"),
    [
        ([], []),
        ([-1.0, -1.0, -1.0], [0.05] * 3),  # too few
        ([-1.0, 1.0, -1.0, 1.0, -1.0, 1.0], [0.05] * 6),  # no sign in common
        ([-1.0, -1.0, 0.0, 0.01, -0.01, 0.02], [0.05] * 6),  # most do nothing
        ([-1.0] * 6, [0.9] * 6),  # not measured well enough
        ([-1.0] * 3 + [np.nan] * 3, [0.05] * 3 + [np.nan] * 3),
    ],
)
def test_others_are_not(fold: list[float], error: list[float]) -> None:
    found = OwnGene.of(np.array(fold), np.array(error))
    assert not found.used
    assert ("not enough to expect it" in str(found)) == (found.n_targets > 0)


def test_how_many_must_agree_is_a_setting() -> None:
    fold, error = np.array([-1.0, -1.0, 0.0]), np.full(3, 0.05)
    assert not OwnGene.of(fold, error).used
    assert OwnGene.of(fold, error, RetrievalSettings(own_gene_min=3, own_gene_share=0.6)).used
    for wrong in ({"own_gene_min": 0}, {"own_gene_share": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RetrievalSettings(**wrong)
