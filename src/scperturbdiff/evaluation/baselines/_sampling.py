"""From control counts and wanted mean expression to counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from scperturbdiff.data import log_normalize

if TYPE_CHECKING:
    from numpy.typing import NDArray


TARGET_SUM = 1e4
PSEUDO = 1.0
"""Added to means (counts per 10,000) before a ratio is taken: without it, genes seen in a few cells explode."""
MAX_CELLS = 500
"""Cells used to find the shares that give a wanted mean of log-normalised expression."""
ROUNDS = 12
STEP = 0.4
"""Power of a correction. Mean log expression answers more than in proportion where controls are overdispersed, so
that whole corrections (1) swing from side to side."""


def mean_rows(matrix: sparse.csr_matrix) -> NDArray[np.float64]:
    """Mean over cells, shape `(n_genes,)`."""
    return np.asarray(matrix.mean(axis=0), dtype=np.float64).ravel()


def mean_share(counts: sparse.csr_matrix) -> NDArray[np.float64]:
    """Mean over cells of a gene's share of the cell's counts, shape `(n_genes,)`; sums up to 1."""
    totals = np.maximum(np.asarray(counts.sum(axis=1), dtype=np.float64).ravel(), 1.0)
    return np.asarray(counts.T @ (1.0 / totals), dtype=np.float64) / counts.shape[0]


def resample(
    counts: sparse.csr_matrix,
    before: NDArray[np.float64],
    after: NDArray[np.float64],
    rng: np.random.Generator,
) -> sparse.csr_matrix:
    """Change counts so that the mean share of each gene goes from `before` to `after`.

    A gene that goes down keeps each of its counts with probability `after / before` (binomial thinning); a gene that
    goes up gains a Poisson number of counts with mean `library size * (after - before)` in every cell. Equal shares
    leave the counts as they are: control counts carry their own sampling noise, and drawing around them again would add
    a second layer. The expected library size of a cell stays what it was as long as both shares add up to 1 (exactly so
    for a cell with the mean composition).

    Parameters
    ----------
    counts
        Control counts, shape `(n_cells, n_genes)`.
    before, after
        Mean shares, shape `(n_genes,)`.
    rng
        Draws the counts.
    """
    keep = np.divide(after, before, out=np.ones_like(after), where=before > after)
    thinned = counts.astype(np.int64)
    thinned.data = rng.binomial(thinned.data, keep[thinned.indices])
    library = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    # A Poisson total per cell, dealt out to genes by what they gain, is an independent Poisson number for every gene.
    gain = np.cumsum(np.maximum(after - before, 0.0))
    number = rng.poisson(library * gain[-1])
    gene = np.searchsorted(gain, rng.random(number.sum()) * gain[-1], side="right").clip(max=len(gain) - 1)
    indptr = np.concatenate([[0], np.cumsum(number)])
    gained = sparse.csr_matrix((np.ones(gene.size, dtype=np.int64), gene, indptr), shape=counts.shape)
    gained.sum_duplicates()
    out = sparse.csr_matrix(thinned + gained)
    out.eliminate_zeros()
    out.sort_indices()
    return out


def shares_for_log_means(
    counts: sparse.csr_matrix, wanted: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float64]:
    """Shares for which resampled counts have given means of log-normalised expression.

    Because E[log1p(x)] is not log1p(E[x]), the shares are found by trial: resample, compare, correct, twelve times.
    Counts normalised per cell add up to the same number, so means that do not fit together (a shift that takes the
    largest gene away and gives its counts to nobody) are reached up to a common factor only.

    Parameters
    ----------
    counts
        Control counts, shape `(n_cells, n_genes)`; at most 500 of the cells are used.
    wanted
        Means of `log1p(counts per 10,000)`, shape `(n_genes,)`; negative ones count as 0.
    rng
        Draws cells and counts.

    Returns
    -------
    Shares that add up to 1, shape `(n_genes,)`.
    """
    before = mean_share(counts)
    if counts.shape[0] > MAX_CELLS:
        counts = counts[np.sort(rng.choice(counts.shape[0], MAX_CELLS, replace=False))]
    here = mean_share(counts)
    goal = np.expm1(np.maximum(wanted, 0.0))
    current = np.expm1(mean_rows(log_normalize(counts)))
    floor = 1e-3
    change = (goal + floor) / (current + floor)
    share = np.where(here > 0, here * change, goal / TARGET_SUM)
    for _ in range(ROUNDS):
        share /= share.sum()
        found = np.expm1(mean_rows(log_normalize(resample(counts, here, share, rng))))
        share = share * np.clip((goal + floor) / (found + floor), 0.25, 4.0) ** STEP
    share /= share.sum()
    # Corrections were found on `counts`; carry them over to the mean shares of all cells.
    share = np.where(here > 0, before * share / np.where(here > 0, here, 1.0), share)
    return share / share.sum()
