"""Predicted cells in pertpy's distances and tests of distances."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc

from scperturbdiff import metrics

if TYPE_CHECKING:
    from anndata import AnnData


@pytest.fixture(scope="module")
def tools() -> Any:
    pytest.importorskip("pertpy", reason="pertpy is not installed")
    from pertpy import tools

    return tools


def moved(controls: AnnData, predicted: AnnData) -> AnnData:
    """Predicted cells, real controls, and predicted cells whose response is beyond doubt, with components."""
    strong = predicted[predicted.obs["perturbation"] == "P01"].copy()
    strong.obs["perturbation"] = "strong"
    dense = strong.X.toarray()
    dense[:, :20] += 2.0
    strong.X = type(strong.X)(dense)
    cells = ad.concat([predicted, strong, controls], join="inner", index_unique="-")
    sc.pp.pca(cells, n_comps=10)
    return cells


def test_distances(tools: Any, controls: AnnData, predicted: AnnData) -> None:
    cells = moved(controls, predicted)
    found = tools.Distance("edistance", obsm_key="X_pca").pairwise(
        cells, groupby="perturbation", show_progressbar=False, n_jobs=1
    )
    assert set(found.index) == {"P01", "P02", "strong", "control"} and np.isfinite(found.to_numpy(float)).all()
    place = {name: cells.obsm["X_pca"][(cells.obs["perturbation"] == name).to_numpy()] for name in found.index}
    ours = {
        name: metrics.energy_distance(place[name], place["control"], unbiased=False)
        for name in ("P01", "P02", "strong")
    }
    theirs = found["control"].astype(float)
    assert max(ours, key=lambda name: ours[name]) == theirs.idxmax() == "strong"
    np.testing.assert_allclose([theirs[name] for name in ours], list(ours.values()), rtol=0.02, atol=0.02)


def test_tests_of_distances(tools: Any, controls: AnnData, predicted: AnnData) -> None:
    test = tools.DistanceTest("edistance", n_perms=100, obsm_key="X_pca")
    table = test(moved(controls, predicted), groupby="perturbation", contrast="control", show_progressbar=False)
    assert {"P01", "P02", "strong"} <= set(table.index)
    assert table["pvalue"].astype(float).between(0, 1).all() and float(table.loc["strong", "pvalue"]) < 0.05


def test_mixscape_finds_predicted_cells_that_respond(tools: Any, controls: AnnData, predicted: AnnData) -> None:
    """A perturbation beyond doubt: nearly all of its cells are called perturbed, and no control cell is."""
    cells = moved(controls, predicted)
    cells = cells[cells.obs["perturbation"].isin(["control", "strong"])].copy()
    mixscape = tools.Mixscape()
    mixscape.perturbation_signature(cells, "perturbation", "control", n_neighbors=10)
    mixscape.mixscape(cells, "perturbation", "control", layer="X_pert", min_de_genes=2)
    called = pd.crosstab(cells.obs["perturbation"], cells.obs["mixscape_class_global"])
    assert called.loc["control", "control"] == (cells.obs["perturbation"] == "control").sum()
    assert called.loc["strong", "KO"] > 0.8 * called.loc["strong"].sum()
