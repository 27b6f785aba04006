"""Which genes vary together in control cells."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.decomposition import PCA

from scperturbdiff.arguments import check_int
from scperturbdiff.data import (
    Labels,
    check_cells,
    check_layer,
    check_obs_keys,
    check_unique_names,
    log_normalize,
    preview,
    read_genes,
)
from scperturbdiff.features._names import Missing, Wanted
from scperturbdiff.features._signs import fix_signs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)


def coexpression(
    adata: AnnData,
    genes: Sequence[str] | None = None,
    *,
    perturbation_key: str | None = None,
    control: str | None = None,
    separator: str | None = "+",
    layer: str | None = None,
    n_components: int = 50,
    min_cells: int = 10,
    aliases: Mapping[str, str] | None = None,
    missing: Missing = "warn",
) -> pd.DataFrame:
    r"""Features of genes from control cells: how each gene varies along the main components of expression.

    For screens whose targets are among the measured genes. Nothing but the screen is needed: no annotation, no file.
    Counts of control cells are normalised to 10,000 a cell and log-transformed, every gene is centred and scaled to
    variance 1, and the first principal components are found without making the matrix dense. A gene's features are its
    *loadings*, that is, its correlations with the scores :math:`s_k` of the components:

    .. math:: f_{gk} = \operatorname{cor}(x_g, s_k), \qquad \sum_k f_{gk} f_{hk} \approx \operatorname{cor}(x_g, x_h).

    The sum is the correlation of two genes itself where all components are kept. A row is never longer than 1; a
    short one says that the gene varies by itself, or that its counts are mostly noise. Components are those of all
    genes and cells, so that a gene's row does not depend on which genes are asked for. Where controls are of several
    cell types, the first components are what tells these apart.

    Parameters
    ----------
    adata
        Cells with raw counts; dense, sparse or backed. It is not changed.
    genes
        Names of the rows wanted, targets of a screen for example. Default: every gene with counts enough.
    perturbation_key, control, separator
        Column of `adata.obs` and the label of control cells in it, as in
        :meth:`scperturbdiff.PerturbDiff.setup_anndata`. Only control cells are used. Without a key all cells are:
        give it wherever there are treated cells, whose responses are what is to be predicted.
    layer
        Layer with the counts; default `X`.
    n_components
        Number of components: fewer than cells and genes.
    min_cells
        Control cells in which a gene must have counts; others have no row.
    aliases
        Other names of genes, alias to name: `{"PD-L1": "CD274"}`. A name of `adata.var_names` comes first.
    missing
        What is done about `genes` that are not measured or hardly expressed: `"warn"` names them and leaves them out,
        `"error"` raises.

    Returns
    -------
    Correlations between -1 and 1, float32, shape `(n_genes, n_components)`: one row a gene in the order of `genes`
    (else of `adata.var_names`), columns `pc1` and so on. The largest entry of a column over all genes is positive.

    Raises
    ------
    KeyError
        If none of `genes` has a row, or with `missing="error"` one has none; with the nearest names. If a key does not
        exist.
    ValueError
        If `adata` does not hold counts, no cell is a control, or `n_components` is too large.
    """
    check_cells(adata)
    check_unique_names(adata)
    wanted = Wanted.of("genes", genes, aliases, missing)
    check_int("min_cells", min_cells, 2)
    rows = _control_rows(adata, perturbation_key, control, separator)
    check_layer(adata, layer, rows)
    names = adata.var_names.astype(str).to_numpy()
    loadings, enough = _loadings(read_genes(adata, layer=layer, rows=rows), names, n_components, min_cells)
    row_of = np.cumsum(enough) - 1  # of genes with counts enough in the table
    if wanted.names is None:
        if n := int((~enough).sum()):
            logger.info("%d of %d genes have counts in fewer than %d cells and no row.", n, len(names), min_cells)
        at, index = np.flatnonzero(enough), names[enough].tolist()
    else:
        found = wanted.rows(
            names.tolist(),
            where="adata.var_names",
            table="the table of co-expression",
            remedy="Only measured genes have features of this kind; other names of the same gene go into aliases.",
            unfit=lambda row: "" if enough[row] else f"counts in fewer than {min_cells} control cells",
        )
        index, at = list(found), np.array(list(found.values()))
    columns = [f"pc{i + 1}" for i in range(n_components)]
    return pd.DataFrame(loadings[row_of[at]], index=pd.Index(index, name="gene"), columns=columns)


def _control_rows(
    adata: AnnData, perturbation_key: str | None, control: str | None, separator: str | None
) -> NDArray[np.intp] | None:
    """Row numbers of control cells; `None`: all cells."""
    if (perturbation_key is None) != (control is None):
        raise ValueError("perturbation_key and control go together: a column of adata.obs, and the label of controls.")
    if perturbation_key is None:
        return None
    check_obs_keys(adata, perturbation_key=perturbation_key)
    labels = Labels(perturbation_key, control, separator)
    labels.check_control(adata.obs)
    return np.flatnonzero(labels.control_cells(adata.obs))


def _loadings(
    counts: sparse.csr_matrix, names: NDArray[Any], n_components: int, min_cells: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Loadings `(n_kept, n_components)` of genes with counts in enough cells, and which of all genes these are."""
    enough = np.bincount(counts.indices[counts.data > 0], minlength=counts.shape[1]) >= min_cells
    n_cells, n_genes = counts.shape[0], int(enough.sum())
    high = min(n_cells, n_genes) - 1
    if high < 1:
        raise ValueError(
            f"{n_genes} genes have counts in {min_cells} or more of {n_cells} cells; two genes and cells are needed."
        )
    check_int("n_components", n_components, 1, high)
    values = log_normalize(counts)[:, np.flatnonzero(enough)].astype(np.float64)
    mean = np.asarray(values.mean(axis=0)).ravel()
    # around the mean, zeros included: the difference of large sums would lose digits of genes that hardly vary
    away = values.copy()
    away.data = (away.data - mean[away.indices]) ** 2
    variance = np.asarray(away.sum(axis=0)).ravel() + (n_cells - values.getnnz(axis=0)) * mean**2
    variance /= n_cells - 1
    flat = variance <= 1e-12 * np.maximum(mean, 1e-12) ** 2
    if flat.any():
        raise ValueError(
            f"{int(flat.sum())} genes have the same share of counts in all {n_cells} cells: "
            f"{preview(names[enough][flat].tolist())}. Leave them out."
        )
    scaled = values @ sparse.diags(1 / np.sqrt(variance), format="csr")
    # the start of the iteration is fixed: the same cells give the same table
    fitted = PCA(n_components, svd_solver="arpack", random_state=0).fit(sparse.csr_matrix(scaled))
    loadings = fitted.components_.T * np.sqrt(fitted.explained_variance_)
    return fix_signs(loadings).astype(np.float32), enough
