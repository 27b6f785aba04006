"""Which control cells predicted cells start from."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from scperturbdiff.data import ControlPool, cells_wanted, log_normalize


def pool_of(n_controls: int, n_genes: int = 60, seed: int = 0) -> ControlPool:
    rng = np.random.default_rng(seed)
    rates = rng.gamma(0.5, 2.0, n_genes) * rng.gamma(5.0, 0.2, (n_controls, 1))
    return ControlPool(sparse.csr_matrix(rng.poisson(rates).astype(np.float32)))


@settings(max_examples=30, deadline=None)
@given(n_controls=st.integers(1, 30), n_cells=st.integers(1, 80), seed=st.integers(0, 3))
def test_controls_are_used_equally_often(n_controls: int, n_cells: int, seed: int) -> None:
    pool = pool_of(n_controls, 5)
    chosen = pool.choose(n_cells, np.random.default_rng(seed))
    used = np.bincount(chosen, minlength=n_controls)
    assert len(chosen) == n_cells and used.max() - used.min() <= 1
    np.testing.assert_array_equal(chosen, pool.choose(n_cells, np.random.default_rng(seed)))


@pytest.mark.parametrize("n_cells", [40, 140, 340, 390])
def test_a_few_cells_have_the_mean_of_all(n_cells: int) -> None:
    pool = pool_of(400)
    x = log_normalize(pool.counts).toarray()
    x = x[:, x.std(0) > 0]
    z = (x - x.mean(0)) / x.std(0)

    def error(chosen: np.ndarray) -> float:
        return float(np.square(z[chosen].mean(0)).mean())

    rng = np.random.default_rng(0)
    ours = np.mean([error(pool.choose(n_cells, rng)) for _ in range(10)])
    at_random = np.mean([error(rng.permutation(400)[:n_cells]) for _ in range(10)])
    assert ours < 0.4 * at_random


def test_a_few_cells_vary_as_all_do_and_from_seed_to_seed() -> None:
    """Cells close to the mean are not preferred."""
    pool = pool_of(400)
    x = log_normalize(pool.counts).toarray()
    chosen = [pool.choose(80, np.random.default_rng(seed)) for seed in range(30)]
    variance = np.mean([x[rows].var(0).sum() for rows in chosen]) / x.var(0).sum()
    assert variance == pytest.approx(1, abs=0.04)
    used = np.bincount(np.concatenate(chosen), minlength=400)
    assert (used == 0).sum() < 40 and used.max() < 20


def test_cells_that_are_all_alike() -> None:
    pool = ControlPool(sparse.csr_matrix(np.ones((20, 4), np.float32)))
    assert len(set(pool.choose(7, np.random.default_rng(0)))) == 7


def test_means_of_resampled_cells_vary_as_samples_of_cells_and_controls_do() -> None:
    value = np.random.default_rng(0).normal(size=40)
    pool = pool_of(40, 5)
    means = [value[pool.resample(20, np.random.default_rng(seed))].mean() for seed in range(4000)]
    assert np.var(means) == pytest.approx(value.var() * (1 / 20 + 1 / 40), rel=0.1)


def test_cells_wanted() -> None:
    assert [cells_wanted(n, 7) for n in (None, float("nan"), 3, 3.0, np.int64(3))] == [7, 7, 3, 3, 3]
    for n in (0, -1, 2.5):
        with pytest.raises(ValueError, match=f"n_cells={n} "):
            cells_wanted(n, 7)
