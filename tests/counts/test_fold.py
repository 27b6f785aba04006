"""Fold changes of mean counts, and the factors that bring them about."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from scperturbdiff.counts import MovedMeans, move_counts
from scperturbdiff.counts._fold import PER_CELL, fold_changed

N = 4000
BEFORE, AFTER = torch.tensor([4.0, 2.0, 1.0, 3.0]), torch.tensor([1.0, 5.0, 1.0, 6.0])
THETA = torch.tensor([2.0, 1.5, 3.0, 0.8])


@pytest.fixture
def means() -> MovedMeans:
    return MovedMeans.of(*arguments())


def arguments() -> tuple[torch.Tensor, ...]:
    """Counts that are not quite what is decoded, and what :func:`move_counts` is given besides."""
    torch.manual_seed(0)
    counts = torch.poisson(torch.tensor([5.0, 2.0, 1.5, 2.5]).expand(N, -1))
    return counts, BEFORE.expand(N, -1), AFTER.expand(N, -1), THETA.expand(N, -1)


def test_means_are_those_of_moved_counts(means: MovedMeans) -> None:
    """Where genes fall, stay and rise."""
    sampled = torch.stack([move_counts(*arguments()).mean(0) for _ in range(20)]).mean(0)
    torch.testing.assert_close(means.moved(), sampled, rtol=0.01, atol=0.005)
    torch.testing.assert_close(means.moved()[2], means.start[2])


def test_factors_bring_about_the_means_that_are_wanted(means: MovedMeans) -> None:
    """`factor` is the inverse of `moved`."""
    torch.testing.assert_close(means.factor(means.moved()), torch.zeros(4), rtol=0, atol=1e-4)
    wanted = torch.tensor([2.0, 0.5, 4.0, 2.5])
    factor = means.factor(wanted)
    changed = MovedMeans(means.start, means.before, means.after * factor.exp(), means.gain)
    torch.testing.assert_close(changed.moved(), wanted, rtol=2e-3, atol=1e-3)
    counts, before, after, theta = arguments()
    sampled = torch.stack([move_counts(counts, before, after * factor.exp(), theta).mean(0) for _ in range(20)]).mean(0)
    torch.testing.assert_close(sampled, wanted, rtol=0.02, atol=0.005)


def test_fold_changes_are_undone_by_their_opposite() -> None:
    before = torch.tensor([0.4, 0.3, 0.2, 0.1])
    after = torch.tensor([0.1, 0.4, 0.2, 0.3])
    fold = ((PER_CELL * after + 1) / (PER_CELL * before + 1)).log()
    torch.testing.assert_close(fold_changed(before, fold), after)
    torch.testing.assert_close(fold_changed(after, -fold), before)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_means_go_towards_fold_changes_as_far_as_wanted(means: MovedMeans, weight: float) -> None:
    """On the log scale: 0 is what is decoded, 1 what the fold changes say, the size of the library kept."""
    total = means.start.sum()
    fold = torch.tensor([-0.5, 0.4, 0.0, 0.2])
    folded = total * fold_changed(means.start / total, fold)
    factor = means.towards_fold(fold, weight)
    changed = MovedMeans(means.start, means.before, means.after * factor.exp(), means.gain).moved()
    torch.testing.assert_close(changed, means.moved() ** (1 - weight) * folded**weight, rtol=2e-3, atol=1e-3)


def test_genes_that_are_not_there_stay_finite() -> None:
    zeros = torch.zeros(5, 3)
    means = MovedMeans.of(zeros, zeros, zeros, torch.ones(5, 3))
    assert means.towards_fold(torch.zeros(3), 1.0).isfinite().all() and means.moved().eq(0).all()


@pytest.mark.parametrize("weight", [1e-6, 0.5, 1.0])
def test_without_effect_no_gene_changes(weight: float) -> None:
    """Genes that no control cell shows are decoded, and must not rise."""
    torch.manual_seed(0)
    decoded = (torch.randn(40, 50).exp() * torch.logspace(-5, 1, 50)).float()
    counts = torch.poisson(decoded)
    assert (counts.sum(0) == 0).any()
    means = MovedMeans.of(counts, decoded, decoded, torch.full((40, 50), 2.0))
    factor = means.towards_fold(torch.zeros(50), weight)
    torch.testing.assert_close(factor, torch.zeros(50), rtol=0, atol=1e-4)
    moved = replace(means, after=means.after * (0.3 * torch.randn(50)).exp())
    torch.testing.assert_close(moved.towards_fold(torch.randn(50), 1e-6), torch.zeros(50), rtol=0, atol=1e-3)


def test_fold_changes_may_be_off_by_errors() -> None:
    """All genes well expressed: but for what normalising makes of all of them, fold changes are off by the errors."""
    torch.manual_seed(0)
    counts = torch.poisson(torch.full((500, 30), 20.0))
    before, after = (torch.rand(30) * 10 + 15 for _ in range(2))
    wide = [x.expand(500, -1) for x in (before, after, torch.full((30,), 5.0))]
    means, factor, error = MovedMeans.of(counts, *wide), 0.3 * torch.randn(30), 0.4 * torch.randn(30)
    exact = means.fold(factor)
    moved = replace(means, after=means.after * factor.exp()).moved()
    shares = [PER_CELL * x / x.sum() + 1 for x in (moved, means.start)]
    torch.testing.assert_close(exact, (shares[0] / shares[1]).log())
    found = means.fold(means.off_by(factor, error)) - exact - error
    torch.testing.assert_close(found, found.mean().expand(30), rtol=0, atol=5e-3)
    torch.testing.assert_close(means.fold(means.off_by(factor, torch.zeros(30))), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fold", [-1.2, 0.9])
def test_own_genes_change_as_wanted_or_further(means: MovedMeans, fold: float) -> None:
    """What moved means say of a gene is kept where it is more of the same; other genes stay."""
    genes, factor = torch.tensor([1, 2]), torch.tensor([0.3, -0.1, 0.2, 0.0])
    found = means.at_least(factor, genes, fold)
    torch.testing.assert_close(found[[0, 3]], factor[[0, 3]])
    before, after = (replace(means, after=means.after * f.exp()).moved() for f in (factor, found))
    wanted = means.start * math.exp(fold)
    assert (wanted[2] < before[2]) == (fold < 0)  # gene 2 hardly moves by itself
    torch.testing.assert_close(after[2], wanted[2], rtol=2e-3, atol=1e-3)
    further = torch.minimum if fold < 0 else torch.maximum
    torch.testing.assert_close(after[1], further(before[1], wanted[1]), rtol=2e-3, atol=1e-3)
