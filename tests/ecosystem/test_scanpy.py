"""Predicted cells in scanpy's usual steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
import scanpy as sc

if TYPE_CHECKING:
    from anndata import AnnData

    from scperturbdiff import PerturbDiff


def test_predicted_cells_lie_among_controls(both: AnnData) -> None:
    assert set(both.obs["perturbation"]) == {"P01", "P02", "control"}
    sc.pp.pca(both, n_comps=10)
    sc.pp.neighbors(both, n_neighbors=10)
    # predicted cells lie among real ones: they have neighbours of the other kind
    made = (both.obs["perturbation"] != "control").to_numpy()
    mixed = both.obsp["connectivities"][made][:, ~made]
    assert (np.asarray(mixed.sum(axis=1)).ravel() > 0).mean() > 0.5


@pytest.mark.slow  # umap-learn is compiled first
def test_predicted_cells_are_embedded_beside_controls(both: AnnData) -> None:
    sc.pp.pca(both, n_comps=10)
    sc.pp.neighbors(both, n_neighbors=10)
    sc.tl.umap(both, maxiter=30)
    assert both.obsm["X_umap"].shape == (both.n_obs, 2) and np.isfinite(both.obsm["X_umap"]).all()


def test_neighbours_in_the_latent_space(predicted: AnnData) -> None:
    cells = predicted.copy()
    sc.pp.neighbors(cells, use_rep="X_perturbdiff")
    assert cells.obsp["connectivities"].shape == (cells.n_obs, cells.n_obs)


def test_genes_that_respond(both: AnnData, trained_model: PerturbDiff, screen: AnnData) -> None:
    sc.tl.rank_genes_groups(both, "perturbation", groups=["P01", "P02"], reference="control", method="wilcoxon")
    given = screen[screen.obs["cell_type"] == "C1"].copy()
    table = trained_model.response(given, ["P01", "P02"], n_cells=60, seed=0, progress=False)
    for name in ("P01", "P02"):
        found = sc.get.rank_genes_groups_df(both, group=name).set_index("names")
        told = table[table["perturbation"] == name].set_index("gene")
        assert isinstance(found, pd.DataFrame) and found["pvals_adj"].between(0, 1).all()
        seen = told.index[told["control_mean"] > told["control_mean"].median()]
        folds = found.loc[seen, "logfoldchanges"], told.loc[seen, "log2_fold_change"]
        assert np.corrcoef(*folds)[0, 1] > 0.8
