"""Metrics of gene means, spreads and correlations, and of how well perturbations are told apart.

Matrices are log-normalised expression, shape `(n_cells, n_genes)`, dense or sparse, with the genes in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy import sparse
from scipy.spatial.distance import cdist

from scperturbdiff.arguments import check_int

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    Genes = Sequence[int] | NDArray[np.integer] | None


def gene_moments(cells: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and s.d. (`ddof=1`) of every gene, shapes `(n_genes,)`; NaN when there are too few cells (1 and 2)."""
    n, n_genes = cells.shape
    if n == 0:
        return np.full(n_genes, np.nan), np.full(n_genes, np.nan)
    if sparse.issparse(cells):
        columns = sparse.csr_matrix(cells)
        # bincount adds in float64, scipy's own mean of a float32 matrix does not
        mean = np.bincount(columns.indices, weights=columns.data, minlength=n_genes) / n
        centred = (columns.data.astype(np.float64) - mean[columns.indices]) ** 2
        squares = np.bincount(columns.indices, weights=centred, minlength=n_genes)
        stored = np.bincount(columns.indices, minlength=n_genes)
        squares = squares + (n - stored) * mean**2
    else:
        values = np.asarray(cells, dtype=np.float64)
        mean = values.mean(axis=0)
        squares = ((values - mean) ** 2).sum(axis=0)
    spread = np.sqrt(squares / (n - 1)) if n > 1 else np.full(n_genes, np.nan)
    return mean, spread


@dataclass(frozen=True)
class Population:
    """Cells, log-normalised expression `(n_cells, n_genes)`, and what is computed from all of them once."""

    cells: Any

    @cached_property
    def moments(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """See :func:`gene_moments`."""
        return gene_moments(self.cells)

    @property
    def mean(self) -> NDArray[np.float64]:
        """Means `(1, n_genes)`: one cell that has the mean of all."""
        return self.moments[0][None]


def mean_shift(cells: Any, control: Any) -> NDArray[np.float64]:
    """Mean of `cells` minus mean of `control` per gene, shape `(n_genes,)`, on the log-normalised scale.

    Use real controls for both the predicted and the observed shift: changing the pool of controls alone moves the
    correlation of shifts more than most models differ.
    """
    if cells.shape[1] != control.shape[1]:
        raise ValueError(f"cells have {cells.shape[1]} genes and controls {control.shape[1]}; they must agree.")
    return gene_moments(cells)[0] - gene_moments(control)[0]


def _select(values: NDArray[np.float64], genes: Genes) -> NDArray[np.float64]:
    return values if genes is None else values[np.asarray(genes, dtype=np.intp)]


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson correlation of two vectors, -1 to 1; NaN when either is constant, has a NaN or fewer than two values."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(a) < 2 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("nan")
    # Constant up to rounding counts as constant: a correlation of rounding errors means nothing.
    if min(np.ptp(a) - 1e-12 * np.abs(a).max(), np.ptp(b) - 1e-12 * np.abs(b).max()) <= 0:
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    return float(np.clip(a @ b / np.sqrt((a @ a) * (b @ b)), -1, 1))


def pearson_delta(pred: Any, real: Any, control: Any, *, genes: Genes = None) -> float:
    r"""Pearson correlation over genes of predicted and observed mean shift.

    Parameters
    ----------
    pred, real, control
        Predicted, real perturbed and real control cells.
    genes
        Positions of the genes to use, such as the top differentially expressed ones of the real cells; `None`: all.

    Returns
    -------
    :math:`\mathrm{corr}_g(\bar p_g - \bar c_g, \bar r_g - \bar c_g)`, -1 to 1; higher is better. NaN when a shift is
    the same for all genes (as when nothing changes at all) or there are no cells. "Pearson delta" of Roohani et al.
    (2024, GEARS) and cell-eval.
    """
    return pearson(_select(mean_shift(pred, control), genes), _select(mean_shift(real, control), genes))


def r2_delta(pred: Any, real: Any, control: Any, *, genes: Genes = None) -> float:
    r"""Coefficient of determination of the mean *shift* over genes.

    :math:`1 - \sum_g(\hat\delta_g-\delta_g)^2 / \sum_g(\delta_g-\bar\delta)^2` with shifts :math:`\delta`. Unlike the
    R2 of means, which is near 1 for the controls themselves, "no change" scores 0 or less here.

    Parameters
    ----------
    pred, real, control, genes
        As in :func:`pearson_delta`.

    Returns
    -------
    At most 1; higher is better. NaN when the real shift is the same for all genes or there are no cells.
    """
    predicted, observed = (_select(mean_shift(cells, control), genes) for cells in (pred, real))
    total = ((observed - observed.mean()) ** 2).sum() if len(observed) else 0.0
    if not total > 0:
        return float("nan")
    return float(1 - ((predicted - observed) ** 2).sum() / total)


def mse_mean(pred: Any, real: Any, *, genes: Genes = None) -> float:
    """Mean over genes of the squared difference of the two gene means, at least 0; lower is better.

    On the log-normalised scale. The same as the MSE of mean shifts, as the controls cancel. NaN without cells or genes.
    """
    predicted, observed = (_select(gene_moments(cells)[0], genes) for cells in (pred, real))
    return float(((predicted - observed) ** 2).mean()) if len(observed) else float("nan")


def sd_ratio(pred: Any, real: Any, *, genes: Genes = None) -> float:
    """Median over genes of predicted over real standard deviation across cells.

    Parameters
    ----------
    pred, real, genes
        As in :func:`pearson_delta`.

    Returns
    -------
    At least 0; 1 is best, below 1 the predicted population is too narrow. Genes constant in the real cells are left
    out; NaN when none remain or a population has fewer than two cells.
    """
    predicted, observed = (_select(gene_moments(cells)[1], genes) for cells in (pred, real))
    varying = observed > 0
    return float(np.median(predicted[varying] / observed[varying])) if varying.any() else float("nan")


def _correlations(block: NDArray[np.float64]) -> NDArray[np.float64]:
    """Correlations of all pairs of different columns; 0 for pairs with a constant column."""
    constant = np.ptp(block, axis=0) == 0
    centred = np.where(constant, 0.0, block - block.mean(axis=0))
    scaled = centred / np.where(constant, 1.0, np.sqrt((centred**2).sum(axis=0)))
    return (scaled.T @ scaled)[np.triu_indices(block.shape[1], k=1)]


def correlation_distance(
    pred: Any, real: Any, *, genes: Genes = None, unbiased: bool = True, n_splits: int = 5, seed: int = 0
) -> float:
    r"""Mean squared difference of the two gene-gene correlation matrices over pairs of different genes.

    Parameters
    ----------
    pred, real, genes
        As in :func:`pearson_delta`. The cells are made dense for these genes, so keep them few (about 100).
    unbiased
        `False`: the plain mean of :math:`(\hat r - r)^2`, which sampling noise lifts by about :math:`1/n + 1/m`.
        `True`: both populations are halved at random and the differences in the two halves multiplied, which leaves
        0 on average for two samples of one population, so that populations of different sizes compare.
    n_splits, seed
        Random halvings averaged with `unbiased=True`, and their seed.

    Returns
    -------
    At most 4; lower is better; slightly negative values are noise. Genes constant in the real cells are left out; a
    gene constant in the predicted cells only has correlation 0 with all others there. NaN with fewer than two varying
    genes or three cells (six with `unbiased=True`), or when no gene varies in the predicted cells.
    """
    check_int("n_splits", n_splits, 1)
    blocks = []
    for cells in (pred, real):
        block = cells if genes is None else cells[:, np.asarray(genes, dtype=np.intp)]
        blocks.append(np.asarray(block.todense() if sparse.issparse(block) else block, dtype=np.float64))
    if min(len(block) for block in blocks) < (6 if unbiased else 3):
        return float("nan")
    varying = np.ptp(blocks[1], axis=0) > 0
    predicted, observed = (block[:, varying] for block in blocks)
    if varying.sum() < 2 or not (np.ptp(predicted, axis=0) > 0).any():
        return float("nan")
    if not unbiased:
        return float(((_correlations(predicted) - _correlations(observed)) ** 2).mean())
    rng = np.random.default_rng(seed)
    products = []
    for _ in range(n_splits):
        order = [rng.permutation(len(block)) for block in (predicted, observed)]
        first, second = (
            _correlations(predicted[order[0][half::2]]) - _correlations(observed[order[1][half::2]]) for half in (0, 1)
        )
        products.append(float((first * second).mean()))
    return float(np.mean(products))


def perturbation_discrimination(
    pred_shifts: ArrayLike, real_shifts: ArrayLike, *, metric: Literal["l1", "l2", "cosine"] = "l1"
) -> NDArray[np.float64]:
    """How well each predicted shift picks out its own perturbation among all of them.

    Parameters
    ----------
    pred_shifts, real_shifts
        Mean shifts, shapes `(n_perturbations, n_genes)`, rows in the same order, all of one context.
    metric
        Distance between a predicted and a real shift.

    Returns
    -------
    Per perturbation `1 - rank / (N - 1)`, where `rank` counts the other perturbations whose real shift is nearer to
    the predicted one than the true one is (a tie counts one half): 0 to 1, higher is better, 0.5 on average by chance.
    The steps depend on `N`, so compare models on the same perturbations only. NaN with fewer than two perturbations,
    for a row with a NaN and, with `metric="cosine"`, for a predicted shift of zero.

    The score of cell-eval2, after the rank of Wu et al. (2024, PerturBench); cell-eval divides by `N` instead.
    """
    names = {"l1": "cityblock", "l2": "euclidean", "cosine": "cosine"}
    if metric not in names:
        raise ValueError(f"metric={metric!r} is unknown. Allowed: {', '.join(map(repr, names))}.")
    predicted, observed = np.asarray(pred_shifts, dtype=np.float64), np.asarray(real_shifts, dtype=np.float64)
    if predicted.shape != observed.shape or predicted.ndim != 2:
        raise ValueError(
            f"pred_shifts {predicted.shape} and real_shifts {observed.shape} must both be (n_perturbations, n_genes)."
        )
    n = len(predicted)
    if n < 2:
        return np.full(n, np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        distances = cdist(predicted, observed, metric=names[metric])
    true = np.diag(distances)[:, None]
    rank = (distances < true).sum(axis=1) + 0.5 * ((distances == true).sum(axis=1) - 1)
    return np.where(np.isnan(distances).any(axis=1), np.nan, 1 - rank / (n - 1))
