"""What populations did, measured once: shifts, spreads, libraries, residuals of genes, the law of replicates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from scperturbdiff.data import Ragged
from scperturbdiff.retrieval import Conditions

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from scperturbdiff.data import PopulationTable

    Rows = NDArray[np.integer]


from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy import sparse

from scperturbdiff.data import iter_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from scperturbdiff.data import PopulationTable, Ragged
    from scperturbdiff.module import PerturbDiffModule


from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import norm

from scperturbdiff.diffusion import NOISE_GRID

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from scperturbdiff.data import PopulationTable, Ragged

    Floats = NDArray[np.float64]


PSEUDO_CELLS = 5
"""Cells with the controls' spread that are added to each population before spreads are compared."""


def describe(table: PopulationTable, latent: Tensor) -> tuple[Conditions, NDArray[np.float64], NDArray[np.float64]]:
    """Conditions of the populations for the anchor, and their responses.

    These are the mean shifts `(n_populations, n_latent)` and the log ratios of spreads `(n_populations,)`.

    Parameters
    ----------
    table
        Populations.
    latent
        Standardised latent vectors of all cells.
    """
    values = latent.detach().cpu().numpy()
    pool_mean = group_means(values, table.match.pools)
    treated = group_means(values, table.cells)
    control = pool_mean[table.match.pool]
    n_controls = table.match.pools.count[table.match.pool]
    pool_square, square = _squares(values, table.match.pools, pool_mean), _squares(values, table.cells, treated)
    within = pool_square.sum() / max(table.match.pools.count.sum(), 1)
    noise = within * (1 / np.maximum(table.cells.count, 1) + 1 / np.maximum(n_controls, 1))
    before = (pool_square / np.maximum(table.match.pools.count - 1, 1))[table.match.pool]
    before = np.where(before > 0, before, max(within, 1e-12))  # a pool of one cell has no spread of its own
    degrees = np.maximum(table.cells.count - 1, 0)
    after = (square + PSEUDO_CELLS * before) / (degrees + PSEUDO_CELLS)
    conditions = Conditions(control, table.component, table.dose, table.context, noise)
    return conditions, treated - control, 0.5 * np.log(after / before)


def group_means(values: NDArray[np.floating], groups: Ragged) -> NDArray[np.float64]:
    """Mean of the rows `values` `(n_cells, d)` of each group, `(n_groups, d)`."""
    sums = np.zeros((len(groups), values.shape[1]))
    np.add.at(sums, np.repeat(np.arange(len(groups)), groups.count), values[groups.rows])
    return sums / np.maximum(groups.count, 1)[:, None]


def _squares(values: NDArray[np.floating], groups: Ragged, means: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum over cells of the squared deviation from the mean of their group, averaged over dimensions, `(n_groups,)`."""
    group = np.repeat(np.arange(len(groups)), groups.count)
    deviation = ((values[groups.rows] - means[group]) ** 2).mean(1)
    sums: NDArray[np.float64] = np.bincount(group, weights=deviation, minlength=len(groups)).astype(np.float64)
    return sums


PRIOR_COUNTS = 5.0
"""Shape and rate of the gamma prior of the ratio of measured to decoded counts of a gene in a population."""
CHUNK = 2048


class CountResponse(NamedTuple):
    """Log ratios of `n` populations to their controls.

    Of mean library sizes `(n,)`, and of measured to decoded counts of each gene `(n, n_genes)`.
    """

    libraries: NDArray[np.float64]
    residuals: NDArray[np.float16]


@torch.no_grad()
def count_response(
    module: PerturbDiffModule,
    matrix: Any,
    batch: NDArray[np.integer],
    latent: torch.Tensor,
    table: PopulationTable,
) -> CountResponse:
    r"""Library sizes and decoder residuals of populations, against those of their controls.

    For a gene of which a population has :math:`o` counts where the decoder expects :math:`e`, the ratio is
    :math:`(o + a) / (e + a)`, its mean under a gamma prior with shape and rate :math:`a` (:data:`PRIOR_COUNTS`).

    Parameters
    ----------
    module
        With the trained VAE, in evaluation mode.
    matrix
        Counts, `(n_cells, n_genes)`, in memory or backed.
    batch
        Batch codes, `(n_cells,)`.
    latent
        Standardised latent vectors, `(n_cells, n_latent)`.
    table
        Populations.
    """
    n_pools = len(table.match.pools)
    groups = sparse.vstack([_members(table.match.pools, len(latent)), _members(table.cells, len(latent))], format="csc")
    measured, decoded = (np.zeros((groups.shape[0], matrix.shape[1]), np.float32) for _ in range(2))
    start = 0
    for block in iter_rows(matrix, chunk=CHUNK):
        counts = np.asarray(block.toarray() if sparse.issparse(block) else block, np.float32)
        rows = slice(start, start + len(counts))
        start += len(counts)
        part = groups[:, rows].tocsr()
        there = np.flatnonzero(np.diff(part.indptr))
        if not len(there):
            continue
        codes = torch.as_tensor(batch[rows], device=latent.device)
        share = module.vae.decode_frequencies(module.unstandardize(latent[rows]), codes).cpu().numpy()
        part = part[there]
        measured[there] += part @ counts
        decoded[there] += part @ (share * counts.sum(1, keepdims=True))
    ratio = np.log((measured + PRIOR_COUNTS) / (decoded + PRIOR_COUNTS))
    size = np.concatenate([table.match.pools.count, table.cells.count])
    library = np.log(np.maximum(measured.sum(1, dtype=np.float64), 1) / np.maximum(size, 1))

    def against_controls(values: NDArray[Any]) -> NDArray[Any]:
        return values[n_pools:] - values[:n_pools][table.match.pool]

    return CountResponse(against_controls(library), against_controls(ratio).astype(np.float16))


def _members(groups: Ragged, n_cells: int) -> sparse.csr_matrix:
    """Which cells each group holds, `(n_groups, n_cells)`."""
    row = np.repeat(np.arange(len(groups)), groups.count)
    return sparse.csr_matrix((np.ones(len(row), np.float32), (row, groups.rows)), (len(groups), n_cells))


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
