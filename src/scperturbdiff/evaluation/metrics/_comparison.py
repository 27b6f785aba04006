"""One condition, predicted against real: what the metrics are computed from, each part made once and when needed."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from scperturbdiff.evaluation.metrics._expression import rank_genes, top_genes

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray


class Projection:
    """Principal components (scikit-learn) of log-normalised expression and an MMD bandwidth, fixed on real cells.

    Parameters
    ----------
    cells
        Real log-normalised cells, shape `(n_cells, n_genes)`, CSR or dense.
    n_pcs
        Components; at most one less than the smaller side of `cells` is used.
    max_cells
        Larger numbers of cells are subsampled to this one for the fit.
    seed
        Of the subsample and of the decomposition.
    """

    def __init__(self, cells: Any, *, n_pcs: int = 50, max_cells: int = 20_000, seed: int = 0) -> None:
        from sklearn.decomposition import PCA

        from scperturbdiff.evaluation.metrics._distances import median_bandwidth

        if n_pcs < 1:
            raise ValueError(f"n_pcs={n_pcs} must be at least 1.")
        if min(cells.shape) < 2:
            raise ValueError(f"Principal components need 2 real cells and 2 genes at least, not {cells.shape}.")
        if cells.shape[0] > max_cells:
            rows = np.random.default_rng(seed).choice(cells.shape[0], max_cells, replace=False)
            cells = cells[np.sort(rows)]
        self.pca = PCA(min(n_pcs, min(cells.shape) - 1), svd_solver="arpack", random_state=seed).fit(cells)
        self.bandwidth = median_bandwidth(self(cells), seed=seed)

    def __call__(self, cells: Any, *, chunk: int = 4096) -> NDArray[np.float64]:
        """Coordinates of `cells`, shape `(n_cells, n_pcs)`."""
        blocks = [self.pca.transform(cells[i : i + chunk]) for i in range(0, cells.shape[0], chunk)]
        return np.concatenate(blocks).astype(np.float64) if blocks else np.empty((0, self.pca.n_components_))


@dataclass
class Observed:
    """Real perturbed cells of one condition with their controls.

    Parameters
    ----------
    real, control
        Log-normalised expression, CSR, shapes `(n, n_genes)` and `(m, n_genes)`.
    projection
        Principal components for the distances between populations.
    n_top
        How many differentially expressed genes are "top".
    de_method
        Test of :func:`~scperturbdiff.metrics.expression.rank_genes`.
    max_cells
        Distances between populations use at most this number of cells of each.
    seed
        Of all subsampling.
    """

    real: Any
    control: Any
    projection: Projection
    n_top: int = 100
    de_method: Literal["t-test", "wilcoxon"] = "t-test"
    max_cells: int = 2000
    seed: int = 0
    _tests: dict[int, pd.DataFrame] = field(default_factory=dict, repr=False)

    @cached_property
    def pcs(self) -> NDArray[np.float64]:
        """Principal components of the real cells."""
        return self.projection(subsample(self.real, self.max_cells, self.seed))

    def tested(self, n_cells: int) -> pd.DataFrame:
        """Differential expression of `n_cells` of the real cells against the controls."""
        if n_cells not in self._tests:
            self._tests[n_cells] = rank_genes(
                self.real, self.control, method=self.de_method, n_cells=n_cells, seed=self.seed
            )
        return self._tests[n_cells]

    @cached_property
    def top(self) -> NDArray[np.intp]:
        """Positions of the top differentially expressed genes of all the real cells."""
        return top_genes(self.tested(self.real.shape[0]), self.n_top)


class Comparison:
    """Predicted cells of one condition (log-normalised CSR, genes as in `observed`) against `observed` ones."""

    def __init__(self, pred: Any, observed: Observed) -> None:
        self.pred = pred
        self.observed = observed

    @property
    def real(self) -> Any:
        """Real perturbed cells."""
        return self.observed.real

    @property
    def control(self) -> Any:
        """Real control cells."""
        return self.observed.control

    @property
    def top(self) -> NDArray[np.intp]:
        """Top differentially expressed genes of the real cells."""
        return self.observed.top

    @cached_property
    def pcs(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Principal components of predicted and real cells."""
        observed = self.observed
        return observed.projection(subsample(self.pred, observed.max_cells, observed.seed)), observed.pcs

    @cached_property
    def tests(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Differential expression of predicted and real cells at the same number of cells."""
        observed = self.observed
        n = min(self.pred.shape[0], observed.real.shape[0])
        if n < 2:
            untested = rank_genes(self.pred[:n], observed.control, method=observed.de_method)
            return untested, untested
        pred = rank_genes(self.pred, observed.control, method=observed.de_method, n_cells=n, seed=observed.seed)
        return pred, observed.tested(n)


def subsample(cells: Any, n: int, seed: int) -> Any:
    """At most `n` rows, drawn without replacement."""
    if cells.shape[0] <= n:
        return cells
    return cells[np.sort(np.random.default_rng(seed).choice(cells.shape[0], n, replace=False))]
