"""Agreement of differential expression tests (as scanpy's) on predicted and on real cells."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse, stats

from scperturbdiff.arguments import check_choice, check_int, check_number
from scperturbdiff.evaluation.metrics._distances import subsample
from scperturbdiff.evaluation.metrics._shifts import Population

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray


DE_METHODS = ("t-test", "wilcoxon")
"""Tests of differential expression."""
LEAST = 1e-9
"""Added to mean expression before a fold change is taken; scanpy's."""
LARGEST = float(np.finfo(np.float32).max)
"""Of test scores: genes that differ and do not vary have endless ones, which cannot be ranked."""


def rank_genes(
    cells: Any,
    control: Any,
    *,
    genes: Sequence[str] | pd.Index | None = None,
    method: Literal["t-test", "wilcoxon"] = "t-test",
    n_cells: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Test every gene for differential expression between `cells` and `control`, as scanpy does.

    Never test decoded means: without within-population variance every gene is significant.

    Parameters
    ----------
    cells, control
        Log-normalised expression, shapes `(n, n_genes)` and `(m, n_genes)`, dense or sparse.
    genes
        Names of the genes, the index of the result; `None`: their positions.
    method
        `"t-test"` (Welch, fast) or `"wilcoxon"` (with tie correction), as :func:`scanpy.tl.rank_genes_groups` has them.
    n_cells, seed
        Number of `cells` to test, drawn without replacement; `None`: all. Significance grows with the number of cells,
        so give the smaller of the two populations' sizes when predicted and real cells are compared.

    Returns
    -------
    One row per gene in the order given, with columns `score` (the test statistic), `log_fold_change` (log2), `p_value`
    and `fdr` (Benjamini-Hochberg). All NaN when either population has fewer than two cells.
    """
    check_choice("method", method, DE_METHODS)
    if cells.shape[1] != control.shape[1]:
        raise ValueError(f"cells have {cells.shape[1]} genes and controls {control.shape[1]}; they must agree.")
    names = pd.RangeIndex(cells.shape[1]) if genes is None else pd.Index(genes)
    if n_cells is not None:
        check_int("n_cells", n_cells, 1, cells.shape[0])
        cells = subsample(cells, n_cells, seed)
    return rank(Population(cells), Population(control), method).set_axis(names)


def rank(cells: Population, control: Population, method: str) -> pd.DataFrame:
    """:func:`rank_genes` of populations, whose moments may be known."""
    columns = ["score", "log_fold_change", "p_value", "fdr"]
    if min(cells.cells.shape[0], control.cells.shape[0]) < 2:
        return pd.DataFrame(np.nan, pd.RangeIndex(cells.cells.shape[1]), columns)
    if method == "t-test":
        return pd.DataFrame(_welch(cells, control), columns=columns)
    return pd.DataFrame(_wilcoxon(cells.cells, control.cells), columns=columns)


def _welch(cells: Population, control: Population) -> NDArray[np.float64]:
    """Welch's test of SciPy, from moments alone; what cannot be tested is not significant."""
    (mean, spread), (base, base_spread) = cells.moments, control.moments
    sizes = cells.cells.shape[0], control.cells.shape[0]
    with np.errstate(invalid="ignore", divide="ignore"):
        score, p = stats.ttest_ind_from_stats(mean, spread, sizes[0], base, base_spread, sizes[1], equal_var=False)
    untested = np.isnan(score) | np.isnan(p)
    fold = np.log2((np.expm1(mean) + LEAST) / (np.expm1(base) + LEAST))
    score, fold, p = np.where(untested, 0.0, score), np.where(untested, 0.0, fold), np.where(untested, 1.0, p)
    return np.stack([score.clip(-LARGEST, LARGEST), fold, p, stats.false_discovery_control(p)], axis=1)


def _wilcoxon(cells: Any, control: Any) -> NDArray[np.float64]:
    """Scanpy's."""
    import scanpy as sc

    both = AnnData(sparse.vstack([sparse.csr_matrix(cells), sparse.csr_matrix(control)], format="csr"))
    both.obs_names = np.arange(both.n_obs).astype(str)
    both.obs["group"] = pd.Categorical(np.repeat(["cells", "control"], [cells.shape[0], control.shape[0]]))
    both.uns["log1p"] = {"base": None}
    with warnings.catch_warnings():
        # A gene that is 0 in all cells gives 0/0 inside scanpy; it comes out below as not significant.
        warnings.filterwarnings("ignore", category=RuntimeWarning)
        sc.tl.rank_genes_groups(
            both, "group", groups=["cells"], reference="control", method="wilcoxon", tie_correct=True
        )
    result = sc.get.rank_genes_groups_df(both, group="cells").set_index("names").loc[both.var_names]
    untested = result["pvals"].isna() | result["scores"].isna()
    result.loc[untested, ["scores", "logfoldchanges"]] = 0.0
    result.loc[untested, ["pvals", "pvals_adj"]] = 1.0
    result["scores"] = result["scores"].clip(-LARGEST, LARGEST)  # of genes that do not vary on either side
    return result[["scores", "logfoldchanges", "pvals", "pvals_adj"]].to_numpy(np.float64)


def top_genes(tested: pd.DataFrame, n: int) -> NDArray[np.intp]:
    """Positions of the `n` genes with the largest absolute test score, strongest first; empty when untested."""
    strength = tested["score"].abs().to_numpy()
    if np.isnan(strength).any():
        return np.empty(0, dtype=np.intp)
    return np.argsort(-strength, kind="stable")[:n]


def _both_tested(pred: pd.DataFrame, real: pd.DataFrame) -> bool:
    if not pred.index.equals(real.index):
        raise ValueError("The two tables must have the same genes in the same order.")
    return len(real) > 0 and not (pred["score"].isna().any() or real["score"].isna().any())


def de_overlap(pred: pd.DataFrame, real: pd.DataFrame, *, k: int = 100) -> float:
    """Share of the `k` genes ranked first in the real cells that are among the `k` ranked first in the predicted ones.

    Parameters
    ----------
    pred, real
        Results of :func:`rank_genes` at matched numbers of cells; genes are ranked by the absolute test score.
    k
        How many genes.

    Returns
    -------
    0 to 1, higher is better; `k / n_genes` by chance. NaN when a test could not be made or when `k` is not less than
    the number of genes (every list would agree).
    """
    check_int("k", k, 1)
    if not _both_tested(pred, real) or k >= len(real):
        return float("nan")
    return len(np.intersect1d(top_genes(pred, k), top_genes(real, k))) / k


def de_precision(pred: pd.DataFrame, real: pd.DataFrame, *, fdr: float = 0.05) -> float:
    """Share of the genes significant in the predicted cells that are so in the real cells, whatever the sign.

    0 to 1, higher is better. NaN when no gene is significant in the predicted cells, or a test could not be made.
    """
    check_number("fdr", fdr, "[0, 1]")
    if not _both_tested(pred, real):
        return float("nan")
    called = pred["fdr"] < fdr
    right = called & (real["fdr"] < fdr)
    return float(right.sum() / called.sum()) if called.any() else float("nan")


def de_recall(pred: pd.DataFrame, real: pd.DataFrame, *, fdr: float = 0.05) -> float:
    """Share of the genes significant in the real cells that are so in the predicted cells, whatever the sign.

    0 to 1, higher is better. NaN when no gene is significant in the real cells, or a test could not be made.
    """
    return de_precision(real, pred, fdr=fdr)


def de_direction(pred: pd.DataFrame, real: pd.DataFrame, *, fdr: float = 0.05) -> float:
    """Share of the genes significant in the real cells whose predicted change has the same sign.

    0 to 1, higher is better; 0.5 by chance, but about 0.7 from the response that all perturbations share. A gene
    predicted not to change at all counts as wrong. NaN when no gene is significant in the real cells, or a test could
    not be made.
    """
    significant = real["fdr"] < fdr
    if not _both_tested(pred, real) or not significant.any():
        return float("nan")
    return float((np.sign(pred["score"]) == np.sign(real["score"]))[significant].mean())


def _ranking(pred: pd.DataFrame, real: pd.DataFrame, fdr: float, area: Callable[..., float]) -> float:
    significant = (real["fdr"] < fdr).to_numpy()
    if not _both_tested(pred, real) or significant.all() or not significant.any():
        return float("nan")
    return float(area(significant, pred["score"].abs().to_numpy()))


def de_auprc(pred: pd.DataFrame, real: pd.DataFrame, *, fdr: float = 0.05) -> float:
    """Average precision with which the predicted absolute score finds the genes significant in the real cells.

    0 to 1, higher is better; by chance the share of genes that are significant. The score itself is used and not a
    clipped p value, whose ties push a model that calls everything towards chance. NaN when no gene or every gene is
    significant in the real cells, or a test could not be made.
    """
    from sklearn.metrics import average_precision_score

    return _ranking(pred, real, fdr, average_precision_score)


def de_auroc(pred: pd.DataFrame, real: pd.DataFrame, *, fdr: float = 0.05) -> float:
    """Area under the ROC curve with which the predicted absolute score finds the genes significant in the real cells.

    0 to 1, higher is better; 0.5 by chance. NaN as for :func:`de_auprc`.
    """
    from sklearn.metrics import roc_auc_score

    return _ranking(pred, real, fdr, roc_auc_score)
