"""Predicted cells beside real controls, as a user passes them on to other packages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anndata as ad
import pytest

from scperturbdiff.data import log_normalize

if TYPE_CHECKING:
    from anndata import AnnData

    from scperturbdiff import PerturbDiff


@pytest.fixture(scope="session")
def controls(screen: AnnData) -> AnnData:
    """Real control cells of one cell type, log-normalised as predictions are; counts in a layer."""
    cells = screen[(screen.obs["perturbation"] == "control") & (screen.obs["cell_type"] == "C1")].copy()
    cells.layers["counts"] = cells.X.copy()
    cells.X = log_normalize(cells.X)
    return cells


@pytest.fixture(scope="session")
def predicted(trained_model: PerturbDiff, screen: AnnData) -> AnnData:
    """Predicted cells of one cell type under two perturbations."""
    given = screen[screen.obs["cell_type"] == "C1"].copy()
    return trained_model.predict(given, ["P01", "P02"], n_cells=60, seed=0, progress=False)


@pytest.fixture
def both(predicted: AnnData, controls: AnnData) -> AnnData:
    """The two in one AnnData."""
    return ad.concat([predicted, controls], join="inner")
