"""A report with all there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest

from scperturbdiff import datasets, report

if TYPE_CHECKING:
    import anndata as ad

    from scperturbdiff import PerturbDiff

METRICS = ["energy_distance", "pearson_delta", "de_auprc"]


@pytest.fixture(scope="module")
def screen_parts(screen: ad.AnnData) -> dict[str, ad.AnnData]:
    """Cells that the session's model was trained on, and others under the same law, which play the measured ones."""
    other = datasets.simulate(
        n_contexts=3, n_perturbations=4, n_genes=100, n_cells_per_population=10, n_batches=2, combinations=1, seed=4
    )
    return {"train": screen, "real": other}


@pytest.fixture(scope="module")
def made(trained_model: PerturbDiff, screen_parts: dict[str, ad.AnnData]) -> dict[str, Any]:
    """A prediction of four conditions, its report with all there is, and the file."""
    real = screen_parts["real"]
    controls = real[(real.obs["perturbation"] == "control").to_numpy()].copy()
    wanted = pd.DataFrame({"perturbation": ["P01", "P02"] * 2, "cell_type": ["C1", "C1", "C2", "C2"]})
    pred = trained_model.predict(controls, wanted, n_cells=30, seed=0, progress=False)
    found = report(pred, real, trained_model, screen_parts["train"], None, metrics=METRICS, n_genes=5, n_splits=1)
    return {"pred": pred, "real": real, "controls": controls, "report": found}
