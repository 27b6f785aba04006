"""Predicted cells as a modality of a MuData, in memory and in a file."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import mudata
import numpy as np
import pandas as pd
from anndata import AnnData

if TYPE_CHECKING:
    from pathlib import Path


def test_predicted_cells_are_a_modality(predicted: AnnData, tmp_path: Path) -> None:
    protein = AnnData(
        np.ones((predicted.n_obs, 2), np.float32),
        obs=pd.DataFrame(index=predicted.obs_names),
        var=pd.DataFrame(index=["CD86", "PDL1"]),
    )
    with mudata.set_options(pull_on_update=False) if hasattr(mudata, "set_options") else nullcontext():
        mdata = mudata.MuData({"rna": predicted.copy(), "protein": protein})
        mdata.write(tmp_path / "both.h5mu")
        read = mudata.read_h5mu(tmp_path / "both.h5mu").mod["rna"]
    pd.testing.assert_frame_equal(read.obs.astype(str), predicted.obs.astype(str))  # text became categories
    assert (read.layers["counts"] != predicted.layers["counts"]).nnz == 0
    np.testing.assert_array_equal(read.obsm["X_perturbdiff"], predicted.obsm["X_perturbdiff"])
    made_by, told = read.uns["scperturbdiff"], predicted.uns["scperturbdiff"]
    assert set(made_by) == set(told) and made_by["seed"] == told["seed"]
