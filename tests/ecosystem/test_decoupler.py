"""Activities of programmes, by decoupler, in predicted cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest

if TYPE_CHECKING:
    from anndata import AnnData


def test_activities_follow_the_genes_that_respond(both: AnnData, predicted: AnnData, controls: AnnData) -> None:
    dc = pytest.importorskip("decoupler", minversion="2", reason="decoupler 2 is not installed")
    p01 = (predicted.obs["perturbation"] == "P01").to_numpy()
    shift = np.asarray(predicted.X[p01].mean(axis=0) - controls.X.mean(axis=0)).ravel()
    up, down = np.argsort(shift)[::-1][:10], np.argsort(shift)[:10]
    net = pd.DataFrame({
        "source": ["up"] * 10 + ["down"] * 10,
        "target": [*predicted.var_names[up], *predicted.var_names[down]],
        "weight": 1.0,
    })  # fmt: skip
    dc.mt.ulm(both, net, tmin=5)
    activity = both.obsm["score_ulm"].groupby(both.obs["perturbation"].to_numpy()).mean()
    assert activity.loc["P01", "up"] > activity.loc["control", "up"]
    assert activity.loc["P01", "down"] < activity.loc["control", "down"]
