"""MuData: RNA is modelled, annotation is found wherever it is kept."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import mudata
import numpy as np
import pandas as pd
import pytest
import scvi
from anndata import AnnData
from mudata import MuData
from scipy import sparse
from tests.helpers import FEW_STEPS, TINY

import scperturbdiff as spd

if TYPE_CHECKING:
    from pathlib import Path

COLUMNS = ["perturbation", "cell_type", "donor"]


@pytest.fixture
def rna() -> AnnData:
    rng = np.random.default_rng(3)
    rows = [(p, c, d) for p in ("control", "A", "B") for c in ("T", "NK") for d in ("d0", "d1") for _ in range(6)]
    obs = pd.DataFrame(rows, columns=COLUMNS, index=[f"cell{i}" for i in range(len(rows))])
    counts = sparse.csr_matrix(rng.poisson(3, (len(obs), 15)).astype(np.float32))
    return AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(15)]))


def without_pulling() -> AbstractContextManager[object]:
    """Columns stay where they are put, which is the rule since mudata 0.4."""
    return mudata.set_options(pull_on_update=False) if hasattr(mudata, "set_options") else nullcontext()


def multimodal(rna: AnnData, annotation: str) -> MuData:
    """RNA and protein; the annotation in the global obs, in RNA or in protein."""
    bare = AnnData(rna.X.copy(), obs=pd.DataFrame(index=rna.obs_names), var=rna.var.copy())
    bare.layers["raw"] = rna.X.copy()
    protein = AnnData(
        np.ones((rna.n_obs, 2), np.float32),
        obs=pd.DataFrame(index=rna.obs_names),
        var=pd.DataFrame(index=["CD3", "CD4"]),
    )
    with without_pulling():
        mdata = MuData({"rna": bare, "protein": protein})
    where = mdata if annotation == "global" else mdata.mod[annotation]
    for column in COLUMNS:
        where.obs[column] = rna.obs[column].to_numpy()
    return mdata


def setup(mdata: MuData, annotation: str, **kwargs: object) -> None:
    arguments = ("perturbation_key", "context_keys", "batch_key")
    given = {"rna_layer": "rna"} | ({} if annotation == "global" else dict.fromkeys(arguments, annotation))
    keys = {"context_keys": ["cell_type"], "batch_key": "donor", "modalities": given}
    spd.PerturbDiff.setup_mudata(mdata, perturbation_key="perturbation", control="control", **(keys | kwargs))


def trained(cells: AnnData | MuData) -> spd.PerturbDiff:
    scvi.settings.seed = 0
    model = spd.PerturbDiff(cells, **TINY)
    model.train(**FEW_STEPS)
    return model


@pytest.mark.parametrize("annotation", ["global", "rna", "protein"])
def test_same_model_as_from_anndata(rna: AnnData, annotation: str, tmp_path: Path) -> None:
    spd.PerturbDiff.setup_anndata(rna, "perturbation", "control", context_keys=["cell_type"], batch_key="donor")
    kwargs = {"n_cells": 5, "seed": 1, "progress": False}
    expected = trained(rna).predict(rna, ["A", "A+B"], **kwargs)
    mdata = multimodal(rna, annotation)
    setup(mdata, annotation, rna_layer="raw")
    model = trained(mdata)
    controls = rna[rna.obs["perturbation"] == "control"].copy()
    model.save(tmp_path / "m")
    again = spd.PerturbDiff.load(tmp_path / "m", adata=mdata)
    for predicted in (
        model.predict(mdata, ["A", "A+B"], **kwargs),
        model.predict(None, ["A", "A+B"], **kwargs),
        model.predict(controls, ["A", "A+B"], **kwargs),
        again.predict(mdata, ["A", "A+B"], **kwargs),
        spd.PerturbDiff.load(tmp_path / "m", adata=False).predict(controls, ["A", "A+B"], **kwargs),
    ):
        pd.testing.assert_frame_equal(predicted.obs, expected.obs, check_categorical=False)
        assert (predicted.layers["counts"] != expected.layers["counts"]).nnz == 0
    assert model.get_latent_representation().shape == (rna.n_obs, 4)
    assert model.response(perturbations=["A"], n_cells=3, progress=False)["n_observed"].gt(0).all()


def test_what_is_wrong_with_a_mudata_is_named(rna: AnnData) -> None:
    mdata = multimodal(rna, "global")
    with pytest.raises(ValueError, match="modalities must say which modality is RNA"):
        setup(mdata, "global", modalities=None)
    with pytest.raises(KeyError, match="'gex', which is not in mdata.mod: 'rna', 'protein'"):
        setup(mdata, "global", modalities={"rna_layer": "gex"})
    with pytest.raises(KeyError, match=r"perturbation_key='perturbation' is not a column"):
        setup(mdata, "protein")
    with pytest.raises(ValueError, match="Extraneous modality"):
        setup(mdata, "global", modalities={"rna_layer": "rna", "protein_layer": "protein"})
    with without_pulling():
        partial = MuData({"rna": mdata.mod["rna"][:50].copy(), "protein": mdata.mod["protein"]})
    with pytest.raises(ValueError, match=r"50 of 72 cells have RNA \(modality 'rna'\)"):
        setup(partial, "global")


def test_mudata_for_a_model_of_anndata(rna: AnnData) -> None:
    spd.PerturbDiff.setup_anndata(rna, "perturbation", "control", context_keys=["cell_type"])
    with pytest.raises(TypeError, match="set up with setup_anndata: pass an AnnData"):
        trained(rna).predict(multimodal(rna, "global"), ["A"], progress=False)
