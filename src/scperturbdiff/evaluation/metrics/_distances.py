"""Distances between two populations of cells, each an array with one row per cell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.spatial.distance import cdist, pdist

from scperturbdiff.arguments import check_int, check_number

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike, NDArray

    Kernel = Callable[[NDArray[np.float64]], NDArray[np.float64]]


_MAX_DISTANCES = 4_000_000
"""Pairwise distances held in memory at a time (32 MB)."""


def subsample(cells: Any, n: int, seed: int) -> Any:
    """At most `n` rows, drawn without replacement."""
    if cells.shape[0] <= n:
        return cells
    return cells[np.sort(np.random.default_rng(seed).choice(cells.shape[0], n, replace=False))]


def _as_populations(x: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    pair = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    for name, array in zip("xy", pair, strict=True):
        if array.ndim != 2:
            raise ValueError(f"{name} must have shape (n_cells, n_features), not {array.shape}.")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} has {int((~np.isfinite(array)).sum())} entries that are NaN or infinite.")
    if pair[0].shape[1] != pair[1].shape[1]:
        raise ValueError(f"x has {pair[0].shape[1]} features and y has {pair[1].shape[1]}; they must agree.")
    return pair


def _sum_pairs(x: NDArray[np.float64], y: NDArray[np.float64], metric: str, kernel: Kernel | None = None) -> float:
    """Sum of `kernel(distance)` over all pairs, block by block."""
    rows = max(1, _MAX_DISTANCES // max(1, len(y)))
    total = 0.0
    for start in range(0, len(x), rows):
        block = cdist(x[start : start + rows], y, metric=metric)
        total += float((block if kernel is None else kernel(block)).sum())
    return total


def energy_distance(x: ArrayLike, y: ArrayLike, *, unbiased: bool = True) -> float:
    r"""Energy distance :math:`2E\|x-y\| - E\|x-x'\| - E\|y-y'\|` between two populations.

    Parameters
    ----------
    x, y
        Populations, shapes `(n, d)` and `(m, d)`, for instance principal components of log-normalised expression.
    unbiased
        `True`: U-statistic, pairs of a cell with itself left out; its mean is 0 for two samples of one population
        whatever their sizes, so that it may be slightly negative. `False`: V-statistic, never negative, biased upwards
        by about `E||x-x'|| / n + E||y-y'|| / m`.

    Returns
    -------
    The distance (no square root is taken), in the units of `x`; lower is better. NaN with fewer than two cells, or none
    with `unbiased=False`. Székely & Rizzo (2013), *Energy statistics*.
    """
    x, y = _as_populations(x, y)
    n, m = len(x), len(y)
    if min(n, m) < (2 if unbiased else 1):
        return float("nan")
    between = _sum_pairs(x, y, "euclidean") / (n * m)
    within = (_sum_pairs(z, z, "euclidean") / (len(z) * (len(z) - unbiased)) for z in (x, y))
    return 2 * between - sum(within)


def median_bandwidth(real: ArrayLike, *, max_cells: int = 1000, seed: int = 0) -> float:
    """Median distance between two different cells of `real`: the heuristic of Gretton et al. (2012), section 8.

    Parameters
    ----------
    real
        Real cells, shape `(n, d)`. Fix the bandwidth on these once; never on predictions.
    max_cells, seed
        Larger populations are subsampled to this number, with this seed.

    Returns
    -------
    The bandwidth, in the units of `real`; NaN when there are fewer than two cells or the median distance is 0.
    """
    cells, _ = _as_populations(real, real)
    if len(cells) < 2:
        return float("nan")
    median = float(np.median(pdist(subsample(cells, max_cells, seed))))
    return median if median > 0 else float("nan")


def mmd(x: ArrayLike, y: ArrayLike, bandwidth: float) -> float:
    r"""Squared maximum mean discrepancy with the kernel :math:`\exp(-\|x-y\|^2 / 2h^2)`, as a U-statistic.

    Parameters
    ----------
    x, y
        As in :func:`energy_distance`.
    bandwidth
        `h`, fixed on real cells by :func:`median_bandwidth`.

    Returns
    -------
    :math:`E k(x,x') + E k(y,y') - 2E k(x,y)`, at most 2; lower is better, 0 on average for two samples of one
    population. NaN with fewer than two cells in either or a bandwidth that is NaN. Gretton et al. (2012), *A kernel
    two-sample test*, equation 3.
    """
    if not np.isnan(bandwidth):
        check_number("bandwidth", bandwidth, "(0, inf)")
    x, y = _as_populations(x, y)
    n, m = len(x), len(y)
    if min(n, m) < 2 or np.isnan(bandwidth):
        return float("nan")

    kernel: Kernel = lambda squared: np.exp(-squared / (2 * bandwidth**2))
    between = _sum_pairs(x, y, "sqeuclidean", kernel) / (n * m)
    within = ((_sum_pairs(z, z, "sqeuclidean", kernel) - len(z)) / (len(z) * (len(z) - 1)) for z in (x, y))
    return sum(within) - 2 * between


def sliced_wasserstein(x: ArrayLike, y: ArrayLike, *, n_projections: int = 100, seed: int = 0) -> float:
    r"""Sliced 2-Wasserstein distance :math:`(E_\theta W_2^2(\theta^\top x, \theta^\top y))^{1/2}`.

    Parameters
    ----------
    x, y
        Populations, shapes `(n, d)` and `(m, d)`; the sizes may differ.
    n_projections, seed
        Directions :math:`\theta`, uniform on the sphere; the same seed gives the same for every pair of one width.

    Returns
    -------
    The distance, in the units of `x`, at least 0; lower is better. Sampling noise makes it positive even for two
    samples of one population. NaN when a population is empty. Bonneel et al. (2015), *Sliced and Radon Wasserstein
    barycenters of measures*; exact along a direction: quantile functions are compared over their common steps.
    """
    check_int("n_projections", n_projections, 1)
    x, y = _as_populations(x, y)
    n, m = len(x), len(y)
    if min(n, m) < 1:
        return float("nan")
    directions = np.random.default_rng(seed).standard_normal((n_projections, x.shape[1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    # Levels in units of 1 / (n * m) are exact integers, so that no step is missed by rounding.
    levels = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)
    weights: NDArray[Any] = np.diff(levels) / (n * m)
    in_x, in_y = levels[:-1] // m, levels[:-1] // n
    total = 0.0
    per_block = max(1, _MAX_DISTANCES // (n + m))
    for start in range(0, n_projections, per_block):
        along = directions[start : start + per_block].T
        gap = np.sort(x @ along, axis=0)[in_x] - np.sort(y @ along, axis=0)[in_y]
        total += float((weights @ gap**2).sum())
    return float(np.sqrt(total / n_projections))
