"""Tables of features meet the model: good ones are taken as they are, bad ones are errors that name rows."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from tests.helpers import FEW_STEPS, TINY

from scperturbdiff import PerturbDiff, datasets, features

if TYPE_CHECKING:
    from anndata import AnnData

NAMES = ["P01", "P02", "P03", "P04", "new"]
KEYS = {"perturbation_key": "perturbation", "control": "control", "context_keys": ["cell_type"]}


@pytest.fixture(scope="module")
def adata() -> AnnData:
    return datasets.simulate(2, 4, 10, 60, n_batches=1, seed=2)


def table(n: int = 5, width: int = 3) -> pd.DataFrame:
    return pd.DataFrame(np.random.default_rng(0).normal(size=(n, width)), index=NAMES[:n])


@pytest.fixture(scope="module")
def model(adata: AnnData) -> PerturbDiff:
    cells = adata.copy()
    PerturbDiff.setup_anndata(cells, **KEYS, perturbation_embeddings=features.join(a=table(4), b=table(4, 2)))
    model = PerturbDiff(cells, **TINY)
    model.train(**FEW_STEPS)
    return model


def test_a_joined_table_predicts_what_was_never_measured(model: PerturbDiff, adata: AnnData) -> None:
    controls = adata[(adata.obs["perturbation"] == "control").to_numpy()].copy()
    later = features.join(a=table().loc[["new"]], b=table(width=2).loc[["new"]])
    pred = model.predict(controls, ["new"], n_cells=5, perturbation_embeddings=later, progress=False)
    assert set(pred.obs["perturbation"]) == {"new"}
    wrong = features.join(a=later)
    wrong["more"] = 1.0
    for call in (model.predict, model.response):
        with pytest.raises(ValueError, match="6 features, the model was set up with 5. Make the rows 'new'"):
            call(controls, ["new"], perturbation_embeddings=wrong)
    for bad, message in (
        (later * np.nan, "NaN or infinite values for 1 names: 'new'"),
        (pd.concat([later, later]), "duplicated names: 'new'"),
    ):
        with pytest.raises(ValueError, match=message):
            model.predict(controls, ["new"], perturbation_embeddings=bad, progress=False)


def set_text(frame: pd.DataFrame) -> pd.DataFrame:
    frame = frame.astype(object)
    frame.loc["P04", frame.columns[1]] = "?"
    return frame


def set_nan(frame: pd.DataFrame) -> pd.DataFrame:
    frame.loc["P02", frame.columns[1]] = np.nan
    return frame


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (set_nan(table()), ValueError, "NaN or infinite values for 1 names: 'P02'"),
        (table().astype("Float64").where(table().index.to_series() != "P03", pd.NA), ValueError, "1 names: 'P03'"),
        (table().replace(table().iloc[0, 0], 1e300), ValueError, "NaN or infinite values for 1 names: 'P01'"),
        (table().rename({"P03": "P01 "}), ValueError, "duplicated names: 'P01'"),
        (table().rename({"P03": " "}), ValueError, "rows without a name, at positions 2"),
        (table().set_axis(["P01", None, "P03", "P04", "x"]), ValueError, "rows without a name, at positions 1"),
        (table().assign(text=list("abcde")), TypeError, r"columns 'text' hold others \('a'\) for 5 names: 'P01'"),
        (set_text(table()), TypeError, r"columns 1 hold .*1 names: 'P04'"),
        ({"P01": [1, 2], "P02": [1, 3], "P03": [1]}, ValueError, "different lengths: 'P01': 2, 'P03': 1. 2 have 2"),
        (table().rename(lambda name: f"x{name}"), ValueError, "no row for any perturbation in training .'P01'"),
    ],
)
def test_bad_tables_are_errors_at_setup_that_name_rows(
    adata: AnnData, bad: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        PerturbDiff.setup_anndata(adata.copy(), **KEYS, perturbation_embeddings=bad)
    cells = adata.copy()
    cells.uns["table"] = bad
    with pytest.raises(error, match=message):
        PerturbDiff.setup_anndata(cells, **KEYS, perturbation_embeddings="table")


def test_columns_and_rows_that_tell_nothing_are_told(adata: AnnData, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="scperturbdiff"):
        PerturbDiff.setup_anndata(adata.copy(), **KEYS, perturbation_embeddings=table().assign(never=0.0))
    assert "perturbation_embeddings" not in caplog.text  # a bit that no molecule has does nothing
    odd = table().assign(bias=1.0)
    with caplog.at_level(logging.WARNING, logger="scperturbdiff"):
        PerturbDiff.setup_anndata(adata.copy(), **KEYS, perturbation_embeddings=odd)
    assert "1 columns with the same value, not 0, for all 5 names, at positions 3" in caplog.text
    nothing = table()
    nothing.loc["P03"] = 0.0
    with caplog.at_level(logging.WARNING, logger="scperturbdiff"):
        PerturbDiff.setup_anndata(adata.copy(), **KEYS, perturbation_embeddings=nothing)
    assert "0 throughout for 1 names, which are like no other: 'P03'" in caplog.text
    for alike, message in (
        (table() * 0 + 2, "the same features for all 5 names: 'P01'"),
        (table(1), "a single row, 'P01'"),
    ):
        with caplog.at_level(logging.WARNING, logger="scperturbdiff"):
            PerturbDiff.setup_anndata(adata.copy(), **KEYS, perturbation_embeddings=alike)
        assert f"perturbation_embeddings has {message}" in caplog.text
