"""MuData: the RNA modality with its annotation, wherever that is kept, as an AnnData."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
from anndata import AnnData
from mudata import MuData

from scperturbdiff.arguments import check_texts
from scperturbdiff.data._messages import preview

if TYPE_CHECKING:
    from collections.abc import Mapping


OBS_ARGUMENTS = (
    "perturbation_key",
    "context_keys",
    "batch_key",
    "dose_key",
    "categorical_covariate_keys",
    "continuous_covariate_keys",
    "control_match_keys",
)
"""Arguments of `setup_mudata` that name columns of `obs`."""
RNA = "rna_layer"


def check_cells(cells: Any, name: str = "adata") -> None:
    """Raise a `TypeError` for what is no AnnData, and for one whose annotation is not in memory."""
    if not isinstance(cells, AnnData):
        raise TypeError(
            f"{name} must be an AnnData, not {type(cells).__name__}; a file or store is opened by "
            "scperturbdiff.open_store or anndata.read_h5ad."
        )
    if not isinstance(cells.obs, pd.DataFrame):
        raise TypeError(
            f"{name} was opened with read_lazy, which leaves annotation on disk and gives no single cell without its "
            f"neighbours. Open the store with scperturbdiff.open_store(path) instead: its X stays on disk, too. Cells "
            f"that fit into memory can be read: {name}.to_memory()."
        )


def rna_view(mdata: MuData, setup_args: Mapping[str, Any]) -> AnnData:
    """The RNA modality as an AnnData whose `obs` has every column that the arguments of `setup_mudata` name.

    `modalities` says where each is kept, by default in the global `obs`. Matrices are shared, not copied. Columns that
    do not exist are left out: what needs them says so. Raises where a modality does not exist (`KeyError`) or that of
    RNA has other cells than the MuData (`ValueError`).
    """
    modalities = setup_args.get("modalities") or {}
    if not modalities.get(RNA):
        raise ValueError(f"modalities must say which modality is RNA, e.g. modalities={{{RNA!r}: 'rna'}}.")
    for name in filter(None, modalities.values()):
        if name not in mdata.mod:
            raise KeyError(f"modalities names {name!r}, which is not in mdata.mod: {preview(mdata.mod)}.")
    rna = mdata.mod[modalities[RNA]]
    if rna.n_obs != mdata.n_obs or not (rna.obs_names == mdata.obs_names).all():
        raise ValueError(
            f"{rna.n_obs} of {mdata.n_obs} cells have RNA (modality {modalities[RNA]!r}), or they are in another "
            f"order. Keep the cells with RNA: mdata[mdata.mod[{modalities[RNA]!r}].obs_names].copy()."
        )
    obs = rna.obs.copy()
    for argument in OBS_ARGUMENTS:
        keys = check_texts(argument, setup_args.get(argument))
        source = mdata.mod[modalities[argument]].obs if modalities.get(argument) else mdata.obs
        for key in keys:
            if key in source:
                obs[key] = source[key].reindex(obs.index)
    layers = {name: rna.layers[name] for name in rna.layers if name is not None}  # None is X since anndata 0.13
    return AnnData(X=rna.X, obs=obs, var=rna.var, layers=layers, uns={**mdata.uns, **rna.uns})


def as_anndata(cells: AnnData | MuData, registry: Mapping[str, Any]) -> AnnData:
    """An AnnData as it is, a MuData through :func:`rna_view` with the model's own arguments."""
    if not isinstance(cells, MuData):
        check_cells(cells)
        return cells
    setup_args = registry["setup_args"]
    if not setup_args.get("modalities"):
        raise TypeError("The model was set up with setup_anndata: pass an AnnData, e.g. mdata.mod['rna'].")
    return rna_view(cells, setup_args)
