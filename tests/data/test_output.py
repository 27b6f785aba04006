"""The cells that are given back."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import sparse

from scperturbdiff.data import (
    assemble_cells,
)

COUNTS = np.array([[1, 0, 3], [0, 2, 0], [4, 0, 1]])


def test_cells_are_assembled_as_documented() -> None:
    obs = pd.DataFrame({"perturbation": ["A", "A", "B"], "control_cell": ["x", "y", "x"], "population": ["0"] * 3})
    var = pd.DataFrame(index=["g1", "g2", "g3"])
    made = assemble_cells(sparse.csr_matrix(COUNTS), obs, var, latent=np.ones((3, 2)), made_by={"seed": 1})
    np.testing.assert_array_equal(made.layers["counts"].toarray(), COUNTS)
    np.testing.assert_allclose(np.expm1(made.X.toarray()).sum(1), 1e4, rtol=1e-4)
    assert made.obsm["X_perturbdiff"].shape == (3, 2) and made.uns["scperturbdiff"] == {"target_sum": 1e4, "seed": 1}
    assert made.obs_names.is_unique and made.obs["perturbation"].tolist() == ["A", "A", "B"]
