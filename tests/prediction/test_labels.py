"""Labels and doses from setup to predicted cells: names that hold separators, lists, very large and small doses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from scperturbdiff import PerturbDiff
from scperturbdiff.datasets import simulate

NAMES = {"P01": "Na+/K+ ATPase inhibitor", "P02": "(+)-JQ1", "P03": "IL-2"}
BRIEF: dict[str, Any] = {"max_epochs": 1, "plan_kwargs": {"steps_per_epoch": 2}, "enable_progress_bar": False}


@pytest.mark.parametrize(("separator", "doses"), [(None, (1e-6, 1e12)), ("-", (1e-6, 3e-6)), ("+", (0.1, 1e12))])
def test_odd_names_and_doses_from_setup_to_cells(separator: str | None, doses: tuple[float, float]) -> None:
    adata = simulate(1, 3, 20, 40, n_batches=1, combinations=2, doses=doses, seed=1)
    written = [[NAMES.get(part, part) for part in name.split("+")] for name in adata.obs["perturbation"]]
    adata.obs["perturbation"] = pd.Series(written, index=adata.obs_names, dtype=object)
    keys = {"perturbation_key": "perturbation", "control": "control", "context_keys": "cell_type", "dose_key": "dose"}
    PerturbDiff.setup_anndata(adata, **keys, separator=separator)
    model = PerturbDiff(adata, n_latent=4)
    model.train(**BRIEF)
    assert model.conditions.components == tuple(sorted(NAMES.values()))
    ranges = model.conditions.dose_range
    assert ranges is not None and set(ranges.values()) == {doses}
    controls = adata[[parts == ["control"] for parts in written]].copy()
    trained = model.predict(controls, n_cells=3, progress=False, seed=0)  # what the table of populations names
    assert trained.obs["perturbation"].nunique() == 5
    wanted = pd.DataFrame(
        {"perturbation": [["IL-2", "(+)-JQ1"], ["(+)-JQ1", "IL-2"]], "dose": [list(doses), list(doses)[::-1]]}
    )
    cells = model.predict(controls, wanted, n_cells=3, progress=False, seed=0)
    assert cells.obs["perturbation"].unique().tolist() == ['["(+)-JQ1", "IL-2"]']
    assert cells.obs["population"].tolist() == ["0"] * 3 + ["1"] * 3  # one request, written in two ways
    second = model.predict(controls, wanted[1:], n_cells=3, progress=False, seed=0)
    np.testing.assert_array_equal(cells.X[:3].toarray(), second.X.toarray())
    assert cells.uns["scperturbdiff"]["doses_outside_training"] == []


def test_doses_are_numbers_where_all_are_numbers() -> None:
    adata = simulate(1, 2, 20, 40, n_batches=1, doses=(0.5, 2.0), seed=1)
    PerturbDiff.setup_anndata(adata, "perturbation", "control", context_keys=["cell_type"], dose_key="dose")
    model = PerturbDiff(adata, n_latent=4)
    model.train(**BRIEF)
    controls = adata[adata.obs["perturbation"] == "control"].copy()
    written = pd.DataFrame({"perturbation": ["P01", "P02"], "dose": ["0.50", "2"]})
    for wanted in (None, written):
        cells = model.predict(controls, wanted, n_cells=3, progress=False, seed=0)
        assert cells.obs["dose"].dtype == float and set(cells.obs["dose"]) == {0.5, 2.0}
