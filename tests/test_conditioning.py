"""Every mixture of conditions goes through the same calls, in memory and from disk; every bad one is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData, read_h5ad
from scipy import sparse

import scperturbdiff as spd

GENES, COMPONENTS = 30, ("A", "B", "C")
TINY = {"n_latent": 4, "n_hidden": 8, "width": 8, "n_layers": 1, "n_heads": 1}
FEW_STEPS = {
    "max_epochs_vae": 1,
    "max_epochs_generator": 1,
    "plan_kwargs": {"steps_per_epoch": 2, "n_populations": 4, "n_cells": 8},
    "enable_progress_bar": False,
    "logger": False,
    "accelerator": "cpu",
}
CASES = list(itertools.product((False, True), (False, True), (False, True), (0, 1, 2)))


def make_cells(combination: bool = False, dose: bool = False, features: bool = False, covariates: int = 0) -> AnnData:
    """About 150 cells with the annotation a case needs."""
    rng = np.random.default_rng(0)
    labels = ["control", "A", "B", *(["A+C", "C+B"] if combination else ["C"])]
    rows = [(label, cell_type) for label in labels for cell_type in ("T", "B cell") for _ in range(13)]
    obs = pd.DataFrame(rows, columns=["perturbation", "cell_type"])
    obs["donor"] = [f"d{i % 2}" for i in range(len(obs))]
    if dose:
        steps = np.where(np.arange(len(obs)) // 2 % 2, 1.0, 10.0)
        treated = obs["perturbation"] != "control"
        obs["dose"] = np.where(treated, steps, 0.0)
        if combination:
            pair = obs["perturbation"].str.contains("+", regex=False)
            obs["dose"] = np.where(pair, [f"{s}+0.5" for s in steps], obs["dose"].astype(str))
    if covariates > 0:
        obs["sex"] = np.where(obs["donor"] == "d0", "f", "m")
    if covariates > 1:
        obs["hours"] = np.where(obs["cell_type"] == "T", 6.0, 24.0)
    obs.index = [f"cell{i}" for i in range(len(obs))]
    mean = rng.gamma(2.0, 2.0, GENES) * (1 + 0.5 * (obs["cell_type"] == "T").to_numpy()[:, None])
    counts = sparse.csr_matrix(rng.poisson(mean).astype(np.float32) + np.eye(len(obs), GENES, dtype=np.float32))
    adata = AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(GENES)]))
    if features:
        adata.uns["embedding"] = pd.DataFrame(rng.normal(size=(3, 5)), index=["A", "B", "new"], columns=list("vwxyz"))
    return adata


def setup(adata: AnnData, **kwargs: object) -> None:
    keys: dict[str, object] = {
        "perturbation_key": "perturbation",
        "control": "control",
        "context_keys": ["cell_type"],
        "batch_key": "donor",
        "dose_key": "dose" if "dose" in adata.obs else None,
        "categorical_covariate_keys": ["sex"] if "sex" in adata.obs else None,
        "continuous_covariate_keys": ["hours"] if "hours" in adata.obs else None,
        "perturbation_embeddings": "embedding" if "embedding" in adata.uns else None,
    }
    spd.PerturbDiff.setup_anndata(adata, **(keys | kwargs))


def wanted(combination: bool, dose: bool, features: bool) -> pd.DataFrame:
    """A known component, one seen only in combination, a new combination, and one known by its features."""
    names = ["A", "C", "B+A" if combination else "A", *(["new"] if features else [])]
    table = pd.DataFrame({"perturbation": names})
    if dose:
        table["dose"] = [3.0, 1.0, "2+5" if combination else 100.0, *([1.0] if features else [])]
    return table


def same_cells(first: AnnData, second: AnnData) -> None:
    """Assert that two predictions agree bit by bit."""
    pd.testing.assert_frame_equal(first.obs, second.obs)
    for a, b in ((first.X, second.X), (first.layers["counts"], second.layers["counts"])):
        assert (a != b).nnz == 0
    np.testing.assert_array_equal(first.obsm["X_perturbdiff"], second.obsm["X_perturbdiff"])


@pytest.fixture(scope="module")
def in_memory() -> dict[tuple, AnnData]:
    """Predictions of the models trained in memory, kept for comparison with those trained from disk."""
    return {}


def trained(adata: AnnData) -> spd.PerturbDiff:
    setup(adata)
    model = spd.PerturbDiff(adata, **TINY)
    model.train(seed=1, **FEW_STEPS)
    return model


def run_in_memory(case: tuple, tmp_path: Path) -> AnnData:
    combination, dose, features, _ = case
    adata = make_cells(*case)
    controls = adata[adata.obs["perturbation"] == "control"].copy()
    model = trained(adata)
    predicted = model.predict(controls, wanted(combination, dose, features), seed=5, n_cells=7, progress=False)
    model.save(tmp_path / "model")
    loaded = spd.PerturbDiff.load(tmp_path / "model", adata=False)
    again = loaded.predict(controls, wanted(combination, dose, features), seed=5, n_cells=7, progress=False)
    same_cells(predicted, again)
    return predicted


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, map(int, c))))
def test_every_mixture_in_memory(case: tuple, tmp_path: Path, in_memory: dict[tuple, AnnData]) -> None:
    combination, dose, features, covariates = case
    predicted = in_memory[case] = run_in_memory(case, tmp_path)
    request = wanted(combination, dose, features)
    assert set(predicted.obs["perturbation"]) == set(request["perturbation"])
    assert predicted.n_obs == 7 * 2 * len(request)
    for key in ("cell_type", "donor", *(["sex"] if covariates else []), *(["hours"] if covariates > 1 else [])):
        assert key in predicted.obs
    assert ("dose" in predicted.obs) == dose


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, map(int, c))))
def test_every_mixture_from_disk(case: tuple, tmp_path: Path, in_memory: dict[tuple, AnnData]) -> None:
    combination, dose, features, _ = case
    if case not in in_memory:
        in_memory[case] = run_in_memory(case, tmp_path)
    make_cells(*case).write_h5ad(tmp_path / "cells.h5ad")
    adata = read_h5ad(tmp_path / "cells.h5ad", backed="r")
    assert adata.isbacked
    model = trained(adata)
    predicted = model.predict(adata, wanted(combination, dose, features), seed=5, n_cells=7, progress=False)
    same_cells(in_memory[case], predicted)
