"""Loadings of genes: a closed form, invariances, and what is said about genes without a row."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy import sparse

from scperturbdiff import datasets, features
from scperturbdiff.data import log_normalize
from scperturbdiff.features._signs import fix_signs

if TYPE_CHECKING:
    from pathlib import Path

CONTROL = {"perturbation_key": "perturbation", "control": "control"}
FEW: dict[str, Any] = {**CONTROL, "n_components": 5, "min_cells": 5}


@pytest.fixture(scope="module")
def adata() -> ad.AnnData:
    return datasets.simulate(3, 3, 30, 60, n_batches=1, seed=1)


def correlations(adata: ad.AnnData) -> np.ndarray:
    """Correlations of log-normalised genes, dense."""
    with np.errstate(invalid="ignore"):  # of genes without counts
        return np.corrcoef(log_normalize(adata.X).toarray().astype(np.float64).T)


def test_products_of_rows_are_the_best_approximation_of_correlations(adata: ad.AnnData) -> None:
    """Closed form: the first eigenvectors of the correlation matrix, scaled by the roots of their eigenvalues."""
    controls = adata[(adata.obs["perturbation"] == "control").to_numpy()].copy()
    found = features.coexpression(adata, **FEW)
    at = adata.var_names.get_indexer(found.index)
    values, vectors = np.linalg.eigh(correlations(controls)[np.ix_(at, at)])
    expected = (vectors[:, -5:] * values[-5:]) @ vectors[:, -5:].T
    assert_allclose(found.to_numpy() @ found.to_numpy().T, expected, atol=1e-5)
    assert_allclose((found.to_numpy() ** 2).sum(axis=0), values[:-6:-1], rtol=1e-4)
    assert found.dtypes.eq(np.float32).all() and found.columns.tolist() == [f"pc{i}" for i in range(1, 6)]
    assert (np.linalg.norm(found, axis=1) <= 1 + 1e-6).all()


def test_a_row_does_not_depend_on_what_is_asked_for_or_how_cells_are_stored(adata: ad.AnnData) -> None:
    whole = features.coexpression(adata, **FEW)
    genes = [adata.var_names[7], adata.var_names[2]]
    pd.testing.assert_frame_equal(features.coexpression(adata, genes, **FEW), whole.loc[genes])
    other = adata.copy()
    other.layers["counts"] = other.X.toarray()
    other.X = other.X.multiply(0).tocsr()
    pd.testing.assert_frame_equal(features.coexpression(other, layer="counts", **FEW), whole)
    order = np.random.default_rng(0).permutation(adata.n_obs)
    assert_allclose(features.coexpression(adata[order].copy(), **FEW), whole, atol=1e-5)


def test_treated_cells_do_not_matter(adata: ad.AnnData) -> None:
    controls = adata[(adata.obs["perturbation"] == "control").to_numpy()].copy()
    expected = features.coexpression(controls, n_components=5, min_cells=5)
    pd.testing.assert_frame_equal(features.coexpression(adata, **FEW), expected)
    everything = features.coexpression(adata, expected.index, n_components=5, min_cells=5)
    assert not np.allclose(everything, expected, atol=1e-2)


def test_genes_that_vary_together_are_alike() -> None:
    rng = np.random.default_rng(0)
    programme = rng.integers(0, 3, size=40)
    activity = rng.gamma(2.0, size=(300, 3))
    counts = rng.poisson(8 * activity[:, programme])
    cells = ad.AnnData(sparse.csr_matrix(counts))
    cells.var_names = [f"g{i}" for i in range(40)]
    unit = features.coexpression(cells, n_components=3)
    unit = unit.div(np.linalg.norm(unit, axis=1), axis=0)
    cosine = (unit @ unit.T).to_numpy()
    same = programme[:, None] == programme[None]
    assert cosine[same].min() > cosine[~same].max()


def test_genes_without_a_row_are_named_with_the_reason(adata: ad.AnnData, caplog: pytest.LogCaptureFixture) -> None:
    cells = adata.copy()
    counts = cells.X.tolil()
    counts[5:, 0] = 0
    cells.X = counts.tocsr()
    asked = ["gene1", cells.var_names[0], cells.var_names[3]]
    with caplog.at_level(logging.WARNING, logger="scperturbdiff"):
        found = features.coexpression(cells, asked, **{**FEW, "min_cells": 10})
    assert found.index.tolist() == [cells.var_names[3]]
    assert "2 of 3 genes" in caplog.text and "'gene1' (nearest: 'gene00" in caplog.text
    assert f"{cells.var_names[0]!r} (counts in fewer than 10 control cells)" in caplog.text
    with pytest.raises(KeyError, match="'gene1'"):
        features.coexpression(cells, asked, **FEW, missing="error")
    with pytest.raises(KeyError, match="1 of 1 genes have no row"):
        features.coexpression(cells, ["nothing of the kind"], **FEW)
    named = features.coexpression(adata, ["PD-L1"], aliases={"PD-L1": adata.var_names[2]}, **FEW)
    assert named.index.tolist() == ["PD-L1"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"n_components": 60}, ValueError, "n_components=60 must be a whole number from 1 to"),
        ({"control": "DMSO"}, ValueError, "control='DMSO' is not a value"),
        ({"control": None}, ValueError, "go together"),
        ({"perturbation_key": "drug"}, KeyError, "perturbation_key='drug' is not a column"),
        ({"layer": "raw"}, KeyError, "layer='raw'"),
        ({"genes": "gene0001", "missing": "ignore"}, ValueError, "missing='ignore' must be one of 'warn', 'error'"),
        ({"genes": ["a", "b", "a"]}, ValueError, "genes has repeated names: 'a'"),
        ({"genes": []}, ValueError, "genes has no names"),
        ({"genes": ["a"], "aliases": {"a": 1}}, TypeError, "aliases must map text to text"),
        ({"min_cells": 1}, ValueError, "min_cells=1"),
        ({"min_cells": 10**6}, ValueError, "0 genes have counts in 1000000 or more"),
    ],
)
def test_wrong_arguments_are_named(
    adata: ad.AnnData, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        features.coexpression(adata, **{**FEW, **change})


def test_values_that_are_no_counts_are_an_error(adata: ad.AnnData) -> None:
    cells = ad.AnnData(log_normalize(adata.X), obs=adata.obs)
    with pytest.raises(ValueError, match="adata.X"):
        features.coexpression(cells, **FEW)
    with pytest.raises(TypeError, match="AnnData"):
        features.coexpression(adata.to_df(), **FEW)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 4))
def test_signs_do_not_depend_on_those_given(seed: int, n: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.integers(-2, 3, size=(n, k)).astype(float)  # with ties
    flipped = vectors * rng.choice([-1.0, 1.0], size=k)
    fixed = fix_signs(vectors)
    assert_allclose(fix_signs(flipped), fixed)
    assert_allclose(np.abs(fixed), np.abs(vectors))
    assert (fixed.max(axis=0) >= 0).all()


def test_real_genes_of_one_programme_are_near(data_dir: Path) -> None:
    """T cells and B cells: a marker's nearest genes are markers of the same type."""
    kang = ad.read_h5ad(data_dir / "kang2018_scgen_valid.h5ad")
    table = features.coexpression(kang, **CONTROL, n_components=30)
    unit = table.div(np.linalg.norm(table, axis=1), axis=0)
    assert {"CD3E", "LCK"} <= set((unit @ unit.loc["CD3D"]).nlargest(8).index)
    assert "MS4A1" in (unit @ unit.loc["CD79A"]).nlargest(5).index
