"""The law of how strongly cells respond, relative to what is predicted for all of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scperturbdiff.retrieval import draw_factors, factors_along, responsiveness_law


def factors(share: float, length: float = 3.0, too_long: float = 1.0, n: int = 4000, seed: int = 0) -> np.ndarray:
    """Of cells of which a share responds; the predicted shift is `too_long` times the true one."""
    rng = np.random.default_rng(seed)
    shift = length * np.array([0.6, 0.0, 0.8])
    responds = rng.random(n) < share
    controls, treated = rng.normal(0, 0.2, (n, 3)), rng.normal(0, 0.2, (n, 3))
    return factors_along(controls, treated + responds[:, None] * shift / share, too_long * shift)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_the_share_of_cells_that_respond_is_found(share: float) -> None:
    law = responsiveness_law([factors(share, seed=seed) for seed in range(3)], [3.0] * 3)
    assert law.mean() == pytest.approx(1)
    assert law.min() >= 0
    assert (law < 0.25).mean() == pytest.approx(1 - share, abs=0.03)
    assert np.median(law[law > 0.5]) == pytest.approx(1 / share, rel=0.05)


def test_cells_that_respond_alike_have_a_factor_of_one() -> None:
    np.testing.assert_allclose(responsiveness_law([factors(1.0)], [3.0]), 1, atol=0.05)


def test_predictions_that_are_off_widen_the_law() -> None:
    off = [factors(1.0, too_long=factor) for factor in (0.5, 1.0, 2.0)]
    assert responsiveness_law(off, [3.0] * 3).std() > 0.3


def test_populations_that_move_against_what_is_predicted_make_no_law() -> None:
    np.testing.assert_array_equal(responsiveness_law([factors(1.0, too_long=-1.0)], [3.0]), 1)


@given(st.permutations(range(6)), st.floats(0.1, 10))
def test_the_law_depends_neither_on_order_nor_on_the_unit_of_lengths(order: list[int], scale: float) -> None:
    made = [factors(0.5, length=1 + seed, n=40, seed=seed) for seed in range(6)]
    lengths = [1.0 + seed for seed in range(6)]
    again = responsiveness_law([made[i] for i in order], [scale * lengths[i] for i in order])
    np.testing.assert_allclose(responsiveness_law(made, lengths), again, rtol=1e-6, atol=1e-6)


@given(st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_drawn_factors_are_spread_evenly_over_the_law(n: int, seed: int) -> None:
    law = np.linspace(0, 2, 64)
    drawn = draw_factors(law, n, np.random.default_rng(seed))
    assert drawn.shape == (n,)
    assert drawn.min() >= 0
    assert drawn.max() <= 2
    assert drawn.mean() == pytest.approx(1, abs=1.1 / n + 0.01)
