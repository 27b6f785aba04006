"""How replicates of a condition differ: the law that draws start from."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.stats import norm

from scperturbdiff.module.generator import NOISE_GRID
from scperturbdiff.train.data import group_means

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from scperturbdiff.data.populations import Ragged
    from scperturbdiff.data.table import PopulationTable

    Floats = NDArray[np.float64]


MANY_REPLICATES, MANY_POPULATIONS = 8, 30
"""Replicates a condition and populations of such conditions from which the shape of the law is read off."""


class ReplicateLaw(NamedTuple):
    """Directions along which the populations of a condition lie apart, and how they are distributed along each.

    `factors` `(n_latent, n_factors)` are as long as the standard deviation along them; `quantiles`
    `(n_factors, n_grid)` are those of a variable of mean 0 and variance 1 where a standard normal one has the values of
    :data:`~scperturbdiff.module.generator.NOISE_GRID`.
    """

    factors: Floats
    quantiles: Floats


def replicate_law(table: PopulationTable, latent: Tensor, max_factors: int) -> ReplicateLaw:
    r"""Estimate how replicates of a condition differ, pooled over conditions.

    The outer product of the factors is the covariance of mean shifts between replicates of a condition, pooled over
    conditions, less what the sampling of cells explains. Deviations from the mean of a condition are whitened by the
    covariance of sampling noise. Eigenvalues of their covariance beyond the largest that noise has
    (:func:`largest_noise_eigenvalue`) are factors, and their inflation by noise is taken back (Baik & Silverstein
    2006). Replicates that differ by chance alone have none.

    Along a factor, populations of conditions with many replicates (:data:`MANY_REPLICATES`) tell the shape of the law
    if there are enough (:data:`MANY_POPULATIONS`): their smoothed distribution. Else it is Gaussian.

    Parameters
    ----------
    table
        Populations.
    latent
        Standardised latent vectors of all cells, `(n_cells, n_latent)`.
    max_factors
        Number of factors at most; the strongest are kept.
    """
    values = latent.detach().cpu().numpy()
    n_latent = values.shape[1]
    none = ReplicateLaw(np.zeros((n_latent, 0)), np.zeros((0, len(NOISE_GRID))))
    condition, size = np.unique(table.condition, return_inverse=True, return_counts=True)[1:]
    freedom, noise_freedom = int((size - 1).sum()), int(table.cells.count.sum()) - len(condition)
    if freedom < 2 or noise_freedom <= n_latent:  # too few populations, or cells in them, to tell one from the other
        return none
    pools = table.match.pools
    treated_mean, control_mean = group_means(values, table.cells), group_means(values, pools)
    treated_noise, control_noise = _within(values, table.cells, treated_mean), _within(values, pools, control_mean)
    shift = treated_mean - control_mean[table.match.pool]
    mean = np.zeros((len(size), n_latent))
    np.add.at(mean, condition, shift)
    deviation = shift - (mean / size[:, None])[condition]
    # the noise of controls that replicates share does not set them apart
    low, high = np.full(len(size), len(pools)), np.zeros(len(size), np.int64)
    np.minimum.at(low, condition, table.match.pool)
    np.maximum.at(high, condition, table.match.pool)
    own = (low < high)[condition]
    weight = 1 - 1 / size[condition]
    noise = (weight / table.cells.count).sum() * treated_noise
    noise = noise + (weight * own / np.maximum(pools.count[table.match.pool], 1)).sum() * control_noise
    strength, axes = np.linalg.eigh(noise / freedom)
    root = axes * np.sqrt(np.maximum(strength, 1e-9 * strength.max()))
    whitened = deviation @ np.linalg.inv(root).T
    found, directions = np.linalg.eigh(whitened.T @ whitened / freedom)
    keep = np.flatnonzero(found > largest_noise_eigenvalue(n_latent, freedom, noise_freedom))[::-1][:max_factors]
    if not len(keep):
        return none
    spiked = spike(found[keep], n_latent / freedom)
    factors = (root @ directions[:, keep]) * np.sqrt(np.maximum(spiked - 1, 0))
    scores = (whitened @ directions[:, keep])[size[condition] >= MANY_REPLICATES]
    gaussian = np.tile(NOISE_GRID, (len(keep), 1))
    return ReplicateLaw(factors, smooth_quantiles(scores) if len(scores) >= MANY_POPULATIONS else gaussian)


def smooth_quantiles(scores: Floats) -> Floats:
    """Quantiles `(k, n_grid)` of scores `(n, k)` after smoothing, at mean 0 and variance 1.

    Half of Silverman's width, which is for one mode and would blur two.
    """
    unit = (scores - scores.mean(0)) / np.maximum(scores.std(0), 1e-12)
    blur = 0.53 * len(unit) ** -0.2 * norm.ppf((np.arange(51) + 0.5) / 51)
    smooth = (unit[:, None, :] + blur[:, None]).reshape(-1, unit.shape[1])
    quantiles: Floats = np.quantile(smooth / smooth.std(0), norm.cdf(NOISE_GRID), axis=0).T
    return quantiles


def largest_noise_eigenvalue(n_dimensions: int, freedom: int, noise_freedom: int, quantile: float = 2.02) -> float:
    """99 % quantile of the largest eigenvalue of the covariance of whitened noise.

    Johnstone's (2001) for a known covariance of noise, times how much further the spectrum reaches where that is
    estimated with `noise_freedom > n_dimensions` degrees of freedom (F matrices; Wachter 1980).
    """
    n, p = np.sqrt(freedom), np.sqrt(n_dimensions)
    known = ((n + p) ** 2 + quantile * (n + p) * (1 / n + 1 / p) ** (1 / 3)) / freedom
    a, b = n_dimensions / freedom, n_dimensions / noise_freedom
    further = (1 + np.sqrt(a + b - a * b)) / (1 - b) / (1 + np.sqrt(a))
    return float(known * further**2)


def spike(eigenvalue: Floats, ratio: float) -> Floats:
    """Eigenvalue of the true covariance behind one of the measured covariance (Baik & Silverstein 2006)."""
    shifted = eigenvalue + 1 - ratio
    out: Floats = (shifted + np.sqrt(np.maximum(shifted**2 - 4 * eigenvalue, 0))) / 2
    return out


def _within(values: NDArray[np.floating], groups: Ragged, mean: Floats) -> Floats:
    """Covariance of cells within groups of given means, `(d, d)`."""
    cells = values[groups.rows].astype(np.float64)
    squares: Floats = cells.T @ cells - (mean * groups.count[:, None]).T @ mean
    return squares / max(len(cells) - len(groups), 1)
