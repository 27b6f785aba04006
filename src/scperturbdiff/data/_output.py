"""The AnnData of predicted cells that the model and every baseline return."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from scperturbdiff.data._counts import log_normalize

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray


CONTROL_CELL = "control_cell"
"""Column of `obs` that names the control cell a predicted cell started from."""
POPULATION = "population"
"""Column of `obs` that numbers the independent draws of a population."""
STATE = "state"
"""Column of `obs` with the state of the control cell, where populations are mixtures of several."""
COUNTS = "counts"
"""Layer with the sampled counts."""
LATENT = "X_perturbdiff"
"""Key of `obsm` with the latent vectors."""
UNS = "scperturbdiff"
"""Key of `uns` with how the cells were made."""
FEW_CELLS = 20
"""Under so many cells a population says little beyond its mean."""
FAR = 0.8
"""Share of the variance of a response that training leaves open from which on a condition is far from training."""


def gene_column(keys: Iterable[str]) -> str:
    """Column of tables with the name of the gene that was measured: another one where a key of the user's is `gene`."""
    return "gene" if "gene" not in keys else "measured_gene"


def assemble_cells(
    counts: sparse.csr_matrix,
    obs: pd.DataFrame,
    var: pd.DataFrame,
    *,
    latent: NDArray[np.floating] | None = None,
    target_sum: float = 1e4,
    made_by: Mapping[str, Any] | None = None,
) -> AnnData:
    """Put sampled counts and their annotation into a new AnnData.

    Parameters
    ----------
    counts
        Sampled counts, shape `(n_cells, n_genes)`.
    obs, var
        One row per cell, whose index is replaced by unique names, and one row per gene, indexed by name.
    latent
        Latent vectors, shape `(n_cells, n_latent)`, stored as `obsm["X_perturbdiff"]`.
    target_sum, made_by
        Counts per cell after normalisation, before the logarithm, and what else to store in `uns["scperturbdiff"]`.

    Returns
    -------
    AnnData with log-normalised expression in `X` (float32 CSR) and counts in `layers["counts"]` (int32 CSR).
    """
    obs = text_as_categories(obs)
    obs.index = "predicted-" + np.arange(len(obs)).astype(str).astype(object)
    cells = AnnData(X=log_normalize(counts, target_sum), obs=obs, var=var.copy())
    cells.layers[COUNTS] = sparse.csr_matrix(counts, dtype=np.int32)
    if latent is not None:
        cells.obsm[LATENT] = np.asarray(latent, dtype=np.float32)
    cells.uns[UNS] = {"target_sum": target_sum, **(made_by or {})}
    return cells


def text_as_categories(table: pd.DataFrame) -> pd.DataFrame:
    """A copy in which columns of text are categories."""
    text = [key for key, kind in table.dtypes.items() if pd.api.types.is_string_dtype(kind)]
    return table.astype(dict.fromkeys(text, "category"))
