"""Which control cells predicted cells start from."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scperturbdiff.data import cells_wanted, choose_controls, resample_controls


@settings(max_examples=30, deadline=None)
@given(n_controls=st.integers(1, 30), n_cells=st.integers(1, 80), seed=st.integers(0, 3))
def test_controls_are_used_equally_often(n_controls: int, n_cells: int, seed: int) -> None:
    chosen = choose_controls(n_controls, n_cells, np.random.default_rng(seed))
    used = np.bincount(chosen, minlength=n_controls)
    assert len(chosen) == n_cells and used.max() - used.min() <= 1
    np.testing.assert_array_equal(chosen, choose_controls(n_controls, n_cells, np.random.default_rng(seed)))


@pytest.mark.parametrize("n_cells", [10, 30, 50])
def test_a_few_cells_are_a_random_subset(n_cells: int) -> None:
    """Means of subsets vary as they do without replacement: none is preferred for its mean."""
    value = np.random.default_rng(0).normal(size=40)
    chosen = [choose_controls(40, n_cells, np.random.default_rng(seed)) for seed in range(3000)]
    rest = n_cells % 40
    expected = value.var() * (1 / rest - 1 / 40) * 40 / 39 * (rest / n_cells) ** 2
    assert np.var([value[rows].mean() for rows in chosen]) == pytest.approx(expected, rel=0.1)
    used = np.bincount(np.concatenate(chosen), minlength=40) / len(chosen)
    np.testing.assert_allclose(used, n_cells / 40, atol=0.05)


def test_means_of_resampled_cells_vary_as_samples_of_cells_and_controls_do() -> None:
    value = np.random.default_rng(0).normal(size=40)
    means = [value[resample_controls(40, 20, np.random.default_rng(seed))].mean() for seed in range(4000)]
    assert np.var(means) == pytest.approx(value.var() * (1 / 20 + 1 / 40), rel=0.1)


def test_cells_wanted() -> None:
    assert [cells_wanted(n, 7) for n in (None, float("nan"), 3, 3.0, np.int64(3))] == [7, 7, 3, 3, 3]
    for n in (0, -1, 2.5):
        with pytest.raises(ValueError, match=f"n_cells={n} "):
            cells_wanted(n, 7)
