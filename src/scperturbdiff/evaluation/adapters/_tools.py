"""One function a tool: matrices and labels are put where `evaluate` looks for them, and nothing else is changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from scperturbdiff.arguments import check_flag, check_number, check_type
from scperturbdiff.data import check_cells, log_normalize, preview

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

GENE_COLUMNS = ("gene_names", "gene_name")
"""Columns of `var` in which STATE writes the names of genes."""


def from_scgen(predicted: AnnData | tuple[AnnData, Any], perturbation: str, *, perturbation_key: str) -> AnnData:
    """What scGen of pertpy returns, ``SCGEN.predict(ctrl_key=..., stim_key=..., celltype_to_predict=...)``.

    Its cells keep the annotation of the control cells they come from, so that all of them are called controls: here
    they get the name of the perturbation that was asked for. Score with `normalized=True`: scGen is trained on
    log-normalised expression, and returns it.

    Parameters
    ----------
    predicted
        The pair of AnnData and latent shift, or the AnnData alone.
    perturbation
        Its `stim_key`.
    perturbation_key
        Column of `obs` with perturbations, scGen's `batch_key`.

    Returns
    -------
    A new AnnData of the cells, log-normalised expression in X.

    Raises
    ------
    TypeError
        If `predicted` is no AnnData.
    """
    cells = predicted[0] if isinstance(predicted, tuple) and len(predicted) == 2 else predicted
    check_type("predicted", cells, AnnData, "an AnnData, or the pair of AnnData and latent shift that scGen returns")
    check_type("perturbation", perturbation, str, "the name of the perturbation")
    out = AnnData(cells.X.copy(), obs=cells.obs.copy(), var=cells.var[[]].copy())
    out.obs[perturbation_key] = pd.Categorical([perturbation] * out.n_obs)
    return out


def from_cpa(adata: AnnData, *, key: str = "CPA_pred", counts: bool = False, target_sum: float = 1e4) -> AnnData:
    """What CPA (cpa-tools) leaves behind, ``CPA.predict(adata)``: a matrix in `adata.obsm`.

    The annotation of `adata` says which conditions were asked for; put the expression of control cells into `adata.X`
    before CPA predicts, as its manual says, or it has seen the cells that it is compared with. Score with
    `normalized=True`.

    Parameters
    ----------
    adata
        The AnnData that CPA was given.
    key
        Where the prediction is.
    counts
        Whether it holds expected counts (CPA trained with `recon_loss="nb"` or `"zinb"`), which are normalised here, or
        log-normalised expression (`"gauss"`).
    target_sum
        Counts per cell of that normalisation.

    Returns
    -------
    A new AnnData of the cells, log-normalised expression in X.

    Raises
    ------
    KeyError
        If `adata.obsm` has no `key`.
    ValueError
        If it has not the shape of `adata.X`, as where draws were not averaged.
    """
    check_cells(adata)
    check_flag("counts", counts)
    check_number("target_sum", target_sum, "(0, inf)")
    if key not in adata.obsm:
        raise KeyError(f"key={key!r} is not in adata.obsm. There are: {preview(adata.obsm)}. CPA.predict writes it.")
    matrix = adata.obsm[key]
    if matrix.shape != adata.shape:
        raise ValueError(
            f"adata.obsm[{key!r}] has shape {matrix.shape}, not the {adata.shape} of adata. With several draws, "
            "predict with return_mean=True."
        )
    values = log_normalize(np.asarray(matrix), target_sum) if counts else np.array(matrix)
    return AnnData(values, obs=adata.obs.copy(), var=adata.var[[]].copy())


def from_cellflow(
    predictions: Mapping[Any, Any],
    covariate_data: pd.DataFrame,
    *,
    condition_id_key: str,
    genes: Sequence[str] | pd.Index | None = None,
    reference: AnnData | None = None,
) -> AnnData:
    """What CellFlow returns, ``CellFlow.predict(adata, covariate_data, condition_id_key=...)``.

    It is a mapping of conditions to arrays in the representation that CellFlow was trained on: genes, or principal
    components, of which the genes are reconstructed here. Score with `normalized=True`.

    Parameters
    ----------
    predictions
        The mapping, arrays of shape `(n_cells, n_features)`.
    covariate_data
        The table of conditions that was asked for. Its columns become those of `obs`.
    condition_id_key
        Its column with the names of conditions, as given to CellFlow.
    genes
        Names of the features, where these are genes.
    reference
        The AnnData of `cellflow.pp.centered_pca`, with `varm["PCs"]` and `varm["X_mean"]`, where features are principal
        components.

    Returns
    -------
    A new AnnData of the cells, log-normalised expression in X if CellFlow was trained on it.

    Raises
    ------
    KeyError
        If `covariate_data` has no column `condition_id_key`, or `reference` no components.
    ValueError
        For conditions that `covariate_data` does not have, arrays of another width, or neither or both of `genes` and
        `reference`.
    """
    if condition_id_key not in covariate_data:
        raise KeyError(f"condition_id_key={condition_id_key!r} is not a column of covariate_data.")
    if (genes is None) == (reference is None):
        raise ValueError(
            "Features have no names in CellFlow's arrays: pass genes=... where they are genes, or reference=... where "
            "they are principal components, and not both."
        )
    if not predictions:
        raise ValueError("predictions names no condition.")
    table = covariate_data.drop_duplicates(condition_id_key).set_index(covariate_data[condition_id_key].name)
    if missing := [name for name in predictions if name not in table.index]:
        raise ValueError(
            f"predictions has conditions without a row in covariate_data[{condition_id_key!r}]: {preview(missing)}."
        )
    names, pcs, centre = _features(genes, reference)
    width = len(names) if pcs is None else pcs.shape[1]
    parts = []
    for name, given in predictions.items():
        array = np.asarray(given, dtype=np.float32)
        if array.ndim != 2 or array.shape[1] != width:
            what = f"{width} genes" if pcs is None else f"{width} components"
            raise ValueError(f"{name!r} has shape {array.shape}; (n_cells, n_features) is wanted, with {what}.")
        rows = table.loc[[name] * len(array)].reset_index()
        rows.index = [f"{name}-{i}" for i in range(len(array))]
        values = array if pcs is None else array @ pcs.T + centre
        parts.append(AnnData(values, obs=rows, var=pd.DataFrame(index=names)))
    return ad.concat(parts, index_unique=None, merge="same")


def _features(genes: Any, reference: AnnData | None) -> tuple[pd.Index, Any, Any]:
    """Names of genes, and what makes genes of components: the axes, shape `(n_genes, n_components)`, and the centre."""
    if reference is None:
        return pd.Index(genes), None, None
    check_cells(reference, "reference")
    if lacking := [key for key in ("PCs", "X_mean") if key not in reference.varm]:
        raise KeyError(f"reference.varm lacks {preview(lacking)}, which cellflow.pp.centered_pca writes.")
    pcs = np.asarray(reference.varm["PCs"], dtype=np.float32)
    return reference.var_names, pcs, np.asarray(reference.varm["X_mean"], dtype=np.float32).ravel()


def from_state(predicted: AnnData, *, genes: Sequence[str] | pd.Index | None = None) -> AnnData:
    """What STATE of the Arc Institute writes, `adata_pred.h5ad` of ``state tx predict``.

    Its genes are numbered, with names in a column of `var` or nowhere. A model that predicts an embedding without a
    decoder has no genes to compare. Score with `normalized=True`: STATE is trained on log-normalised expression.

    Parameters
    ----------
    predicted
        The file, read by :func:`anndata.read_h5ad`.
    genes
        Names of the genes in the order of X; `None`: column `gene_names` of `var`, or `var_names` that are no numbers.

    Returns
    -------
    A new AnnData of the cells with names of genes. Control cells may stay among them.

    Raises
    ------
    ValueError
        If there are no names, or another number of them than columns.
    """
    check_cells(predicted, "predicted")
    if genes is None:
        named = [column for column in GENE_COLUMNS if column in predicted.var]
        if named:
            genes = predicted.var[named[0]].astype(str)
        elif not predicted.var_names.str.fullmatch(r"\d+").all():
            genes = predicted.var_names
        else:
            raise ValueError(
                "predicted.var has no names of genes, only numbers: pass genes=..., the names in the order of X."
            )
    names = pd.Index(list(genes))
    if len(names) != predicted.n_vars:
        raise ValueError(
            f"There are {len(names)} names for {predicted.n_vars} columns of X. Is X an embedding rather than genes?"
        )
    matrix = predicted.X.copy() if sparse.issparse(predicted.X) else np.array(predicted.X)
    out = AnnData(matrix, obs=predicted.obs.copy(), var=pd.DataFrame(index=names))
    out.obs_names = out.obs_names.astype(str)
    return out
