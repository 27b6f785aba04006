"""Counts drawn from the negative binomial law, thinned, and moved to other means."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scperturbdiff.counts import move_counts, thin
from scperturbdiff.counts._move import _move_dense
from scperturbdiff.counts._sampling import sample_negative_binomial


@pytest.mark.parametrize(("mean", "shape"), [(0.05, 0.3), (0.5, 2.0), (3.9, 0.2), (3.9, 5.0), (6.0, 1.0)])
def test_sampled_counts_follow_the_negative_binomial_law(mean: float, shape: float) -> None:
    """By inversion below the threshold and as a mixture above it; Kolmogorov-Smirnov at 1 in 1,000."""
    from scipy import stats

    n = 100_000
    counts = sample_negative_binomial(torch.full((n,), mean), torch.full((n,), shape)).numpy().astype(int)
    shares = np.bincount(counts, minlength=80)[:80].cumsum() / n
    assert np.abs(shares - stats.nbinom.cdf(np.arange(80), shape, shape / (shape + mean))).max() < 1.95 / n**0.5


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_each_molecule_stays_with_the_same_probability(share: float) -> None:
    """Kolmogorov-Smirnov at 1 in 1,000, for each count there is."""
    from scipy import stats

    n, rng = 20_000, torch.Generator().manual_seed(0)
    counts = torch.tensor([0.0, 1.0, 2.0, 7.0, 300.0]).expand(n, -1)
    kept = thin(counts, share, rng)
    assert kept.shape == counts.shape and kept.dtype == counts.dtype
    for before, after in zip(counts[0].numpy().astype(int), kept.T.numpy().astype(int), strict=True):
        shares = np.bincount(after, minlength=301).cumsum() / n
        assert np.abs(shares - stats.binom.cdf(np.arange(301), before, share)).max() < 1.95 / n**0.5
    assert torch.equal(kept, thin(counts, share, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize(("before", "after"), [(2.0, 0.5), (0.3, 0.2), (0.4, 1.5), (6.0, 9.0)])
def test_moved_counts_have_the_law_of_the_new_mean(before: float, after: float, repeated: bool) -> None:
    """Thinned, added to or drawn again; Kolmogorov-Smirnov at 1 in 1,000."""
    from scipy import stats

    n, theta = 100_000, 1.3
    full = torch.ones(n, 1)
    torch.manual_seed(0)
    counts = sample_negative_binomial(before * full, theta * full)
    means = before * full, after * full, theta * full
    expected = stats.nbinom.cdf(np.arange(80), theta, theta / (theta + after))
    # the second way is the one of graphics cards
    for moved in (move_counts(counts, *means, torch.full((n,), repeated)), _move_dense(counts, *means)):
        shares = np.bincount(moved.numpy().astype(int).ravel(), minlength=80)[:80].cumsum() / n
        assert np.abs(shares - expected).max() < 1.95 / n**0.5


def test_counts_change_only_as_far_as_their_means() -> None:
    torch.manual_seed(0)
    counts = torch.poisson(torch.full((2000, 3), 4.0))
    means, theta = torch.tensor([4.0, 4.0, 4.0]).expand_as(counts), torch.full_like(counts, 2.0)
    assert torch.equal(move_counts(counts, means, means, theta), counts)
    after = torch.tensor([2.0, 4.0, 8.0]).expand_as(counts)
    moved = move_counts(counts, means, after, theta)
    assert (moved[:, 0] <= counts[:, 0]).all() and (moved[:, 2] >= counts[:, 2]).all()
    assert torch.equal(moved[:, 1], counts[:, 1])
    repeated = torch.arange(2000) >= 1000
    some = move_counts(counts, means, means, theta, repeated)
    assert torch.equal(some[:1000], counts[:1000])
    assert (some[1000:] == counts[1000:]).float().mean() < 0.5  # copies differ from what they copy
    assert torch.corrcoef(torch.stack([some[1000:].ravel(), counts[1000:].ravel()]))[0, 1] > 0.4  # but are like it


def test_a_dispersion_that_cells_share_is_that_of_each() -> None:
    """A row that all cells share is not copied; what is given stays."""
    torch.manual_seed(0)
    counts, theta = torch.poisson(torch.full((300, 5), 2.0)), torch.tensor([0.3, 1.0, 2.0, 5.0, 1e6])
    before, after = 4 * torch.rand(300, 5) + 0.1, 4 * torch.rand(300, 5) + 0.1
    repeated = torch.arange(300) % 3 == 0
    given = counts.clone(), before.clone(), after.clone()
    one, other = (
        move_counts(counts, before, after, shared, repeated, torch.Generator().manual_seed(1))
        for shared in (theta.expand(300, 5), theta.repeat(300, 1))
    )
    assert torch.equal(one, other)
    assert all(torch.equal(a, b) for a, b in zip(given, (counts, before, after), strict=True))
    whole = move_counts(counts, before, after, theta.expand(300, 5), torch.ones(300, dtype=torch.bool))
    assert (whole != counts).any(0).all()


@pytest.mark.parametrize("shape", [1e-6, 1.0, 1e6, 1e12, 1e16, 1e30])
def test_counts_of_any_dispersion_are_drawn(shape: float) -> None:
    """Poisson counts in the limit; rounding must not ask for counts that have no probability."""
    mean = torch.full((20_000,), 2.0)
    drawn = sample_negative_binomial(mean, torch.full_like(mean, shape))
    if shape > 1:
        assert abs(float(drawn.mean()) - 2) < 0.05
        assert abs(float(drawn.var()) - 2) < 0.15
    assert bool((drawn >= 0).all())
