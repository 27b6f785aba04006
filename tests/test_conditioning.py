"""Every mixture of conditions goes through the same calls, in memory and from disk; every bad one is refused."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
import scvi
from anndata import AnnData, read_h5ad, read_zarr
from scipy import sparse
from tests import helpers
from tests.helpers import TINY, assert_same_cells

import scperturbdiff as spd

if TYPE_CHECKING:
    from pathlib import Path

GENES, COMPONENTS = 30, ("A", "B", "C")
# with validation, anchors are fitted twice, which takes most of the time here
FEW_STEPS = helpers.FEW_STEPS | {"validation_size": 0.0}
CASES = list(itertools.product((False, True), (False, True), (False, True), (0, 1, 2)))
PAIRWISE = {(0, 0, 0, 0), (1, 1, 1, 0), (0, 1, 1, 1), (1, 0, 0, 1), (1, 0, 1, 2), (0, 1, 0, 2)}
"""Cases that have every pair of options; others are slow."""


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


def trained(adata: AnnData) -> spd.PerturbDiff:
    scvi.settings.seed = 0  # of the initial weights
    setup(adata)
    model = spd.PerturbDiff(adata, **TINY)
    model.train(seed=1, **FEW_STEPS)
    return model


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case in PAIRWISE else [pytest.mark.slow]) for case in CASES],
    ids=lambda c: "-".join(map(str, map(int, c))),
)
def test_every_mixture_in_memory_and_from_disk(case: tuple, tmp_path: Path) -> None:
    combination, dose, features, covariates = case
    request = wanted(combination, dose, features)
    kwargs = {"perturbations": request, "seed": 5, "n_cells": 7, "progress": False}
    adata = make_cells(*case)
    controls = adata[adata.obs["perturbation"] == "control"].copy()
    model = trained(adata)
    predicted = model.predict(controls, **kwargs)
    assert set(predicted.obs["perturbation"]) == set(request["perturbation"])
    assert predicted.n_obs == 7 * 2 * len(request)
    for key in ("cell_type", "donor", *(["sex"] if covariates else []), *(["hours"] if covariates > 1 else [])):
        assert key in predicted.obs
    assert ("dose" in predicted.obs) == dose
    model.save(tmp_path / "model")
    assert_same_cells(predicted, spd.PerturbDiff.load(tmp_path / "model", adata=False).predict(controls, **kwargs))

    make_cells(*case).write_h5ad(tmp_path / "cells.h5ad")
    backed = read_h5ad(tmp_path / "cells.h5ad", backed="r")
    assert backed.isbacked
    model = trained(backed)
    assert_same_cells(predicted, model.predict(backed, **kwargs))
    model.save(tmp_path / "backed")
    assert_same_cells(predicted, spd.PerturbDiff.load(tmp_path / "backed", adata=False).predict(backed, **kwargs))
    assert_same_cells(predicted, spd.PerturbDiff.load(tmp_path / "backed", adata=backed).predict(**kwargs))


# ---- what is wrong is named ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def doses_and_covariates() -> tuple[spd.PerturbDiff, AnnData]:
    """A model with everything: combinations, doses, features, two covariates."""
    adata = make_cells(True, True, True, 2)
    return trained(adata), adata


def ask(model: spd.PerturbDiff, adata: AnnData, **columns: object) -> AnnData:
    return model.predict(adata, pd.DataFrame(columns), n_cells=4, seed=0, progress=False)


def test_unknown_component_is_named(doses_and_covariates: tuple[spd.PerturbDiff, AnnData]) -> None:
    model, adata = doses_and_covariates
    with pytest.raises(KeyError, match=r"1 perturbation components were never seen.*'nwe'.*Known: 'A', 'B', 'C'"):
        ask(model, adata, perturbation=["A+nwe"], dose=[1.0])


def test_missing_dose_is_asked_for(doses_and_covariates: tuple[spd.PerturbDiff, AnnData]) -> None:
    model, adata = doses_and_covariates
    with pytest.raises(ValueError, match=r"set up with dose_key='dose': give a dose"):
        model.predict(adata, ["A"], progress=False)


@pytest.mark.parametrize(
    ("dose", "message"),
    [
        (-1.0, r"-1.0 for 'A': doses must be finite and not negative"),
        (np.nan, r"nan for 'A': doses must be finite and not negative"),
        (np.inf, r"inf for 'A': doses must be finite and not negative"),
        ("1+2", r"has 2 values for 1 components"),
        ("low", r"cannot read 'low' for 'A'"),
    ],
)
def test_bad_doses_of_a_request(
    doses_and_covariates: tuple[spd.PerturbDiff, AnnData], dose: object, message: str
) -> None:
    model, adata = doses_and_covariates
    with pytest.raises(ValueError, match=message):
        ask(model, adata, perturbation=["A"], dose=[dose])


@pytest.mark.parametrize(("dose", "message"), [(-1.0, "not negative"), (np.nan, "must be finite")])
def test_bad_doses_of_cells(dose: float, message: str) -> None:
    adata = make_cells(dose=True)
    adata.obs.loc["cell40", "dose"] = dose
    with pytest.raises(ValueError, match=rf"obs\['dose'\]={dose} for '[ABC]': doses.*{message}"):
        setup(adata)


def test_controls_with_a_dose() -> None:
    adata = make_cells(dose=True)
    adata.obs.loc["cell0", "dose"] = 2.0
    with pytest.raises(
        ValueError, match=r"obs\['dose'\]=2.0 for control cells \('control'\): controls must have dose 0"
    ):
        setup(adata)


def test_dose_zero_is_control() -> None:
    adata = make_cells(dose=True)
    adata.obs.loc[adata.obs["perturbation"] == "B", "dose"] = 0.0
    setup(adata)
    assert spd.PerturbDiff(adata, **TINY).conditions.components == ("A", "C")


def test_dose_without_a_key() -> None:
    adata = make_cells()
    model = trained(adata)
    with pytest.raises(KeyError, match=r"columns the model knows nothing of: 'dose'. Allowed: .*'perturbation'"):
        ask(model, adata, perturbation=["A"], dose=[1.0])
    with pytest.raises(ValueError, match="dose_key='cell_type' needs a perturbation_key"):
        setup(adata, perturbation_key=None, control=None, dose_key="cell_type")


def test_missing_column_is_named() -> None:
    with pytest.raises(KeyError, match=r"dose_key='dos' is not a column.*Did you mean 'dose'"):
        setup(make_cells(dose=True), dose_key="dos")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pd.DataFrame(np.eye(3), index=["A", "A", "B"]), "duplicated names: 'A'"),
        (pd.DataFrame([[1.0, np.nan], [1.0, 2.0]], index=["A", "B"]), "NaN or infinite values for 1 names: 'A'"),
        (pd.DataFrame([[1.0, 2.0], [np.inf, 2.0]], index=["A", "B"]), "NaN or infinite values for 1 names: 'B'"),
        ({"A": [1.0], "B": [1.0, 2.0]}, "different lengths.*'A': 1, 'B': 2"),
        (pd.DataFrame(index=["A"]), "is empty"),
    ],
)
def test_bad_feature_tables(table: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        setup(make_cells(), perturbation_embeddings=table)


def test_feature_table_that_is_not_there() -> None:
    with pytest.raises(KeyError, match=r"'embeding' is not in adata.uns. Keys: 'embedding'"):
        setup(make_cells(features=True), perturbation_embeddings="embeding")


def test_features_that_come_with_the_request(doses_and_covariates: tuple[spd.PerturbDiff, AnnData]) -> None:
    model, adata = doses_and_covariates
    table = pd.DataFrame({"perturbation": ["later"], "dose": [1.0]})
    kwargs = {"n_cells": 4, "seed": 0, "progress": False}
    predicted = model.predict(adata, table, perturbation_embeddings={"later": np.ones(5)}, **kwargs)
    assert set(predicted.obs["perturbation"]) == {"later"}
    with pytest.raises(ValueError, match="NaN or infinite values for 1 names: 'later'"):
        model.predict(adata, table, perturbation_embeddings={"later": [1.0, np.nan, 0.0, 0.0, 0.0]}, **kwargs)
    with pytest.raises(KeyError, match="'later'.*give it a row in perturbation_embeddings"):
        model.predict(adata, table, perturbation_embeddings={"other": np.ones(5)}, **kwargs)
    with pytest.raises(ValueError, match="has 2 features, the model was set up with 5"):
        model.predict(adata, table, perturbation_embeddings={"later": [1.0, 2.0]}, **kwargs)
    without = trained(make_cells())
    with pytest.raises(ValueError, match="set up without"):
        without.predict(adata, ["later"], perturbation_embeddings={"later": np.ones(5)}, **kwargs)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("", "an empty component"),
        ("A+", "an empty component"),
        ("A+B+A", "a repeated component"),
    ],
)
def test_labels_with_empty_or_repeated_components(
    doses_and_covariates: tuple[spd.PerturbDiff, AnnData], label: str, message: str
) -> None:
    adata = make_cells()
    adata.obs.loc["cell40", "perturbation"] = label
    expected = rf"obs\['perturbation'\]={label!r} has {message}. Allowed: 'control'".replace("+", r"\+")
    with pytest.raises(ValueError, match=expected):
        setup(adata)
    model, cells = doses_and_covariates
    with pytest.raises(ValueError, match=expected):
        ask(model, cells, perturbation=[label], dose=[1.0])


def test_features_of_no_training_perturbation() -> None:
    with pytest.raises(ValueError, match=r"no row for any perturbation in training \('A', 'B', 'C'\).*rows: 'x', 'y'"):
        setup(make_cells(), perturbation_embeddings={"x": [1.0], "y": [2.0]})


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "NaN or infinite for 1 rows"), ("noon", "not numeric: 'noon'")]
)
def test_bad_numbers_of_a_request(
    doses_and_covariates: tuple[spd.PerturbDiff, AnnData], value: object, message: str
) -> None:
    model, adata = doses_and_covariates
    with pytest.raises(ValueError, match=rf"continuous covariate 'hours' is {message}"):
        ask(model, adata, perturbation=["A"], dose=[1.0], hours=[value])


def test_unseen_covariate_value(doses_and_covariates: tuple[spd.PerturbDiff, AnnData]) -> None:
    model, adata = doses_and_covariates
    with pytest.raises(ValueError, match=r"'sex' has values never seen in training: 'x'. Known: 'f', 'm'"):
        ask(model, adata, perturbation=["A"], dose=[1.0], sex=["x"])
    predicted = ask(model, adata, perturbation=["A"], dose=[1.0], hours=[12.0])
    assert set(predicted.obs["hours"]) == {12.0}


def test_population_without_any_control() -> None:
    adata = make_cells()
    keep = ~((adata.obs["perturbation"] == "control") & (adata.obs["cell_type"] == "T"))
    adata = adata[keep].copy()
    setup(adata)
    model = spd.PerturbDiff(adata, **TINY)
    with pytest.raises(ValueError, match=r"have no control cells: no control agrees on \['cell_type'\] = 'T'"):
        model.train(**FEW_STEPS)
    with pytest.raises(ValueError, match=r"control='ctrl' is not a value of obs\['perturbation'\]"):
        setup(adata, control="ctrl")


def test_request_for_controls_that_are_not_there(doses_and_covariates: tuple[spd.PerturbDiff, AnnData]) -> None:
    model, adata = doses_and_covariates
    with pytest.raises(ValueError, match=r"No control cells for 'A' with \{'cell_type': 'NK'\}"):
        ask(model, adata, perturbation=["A"], dose=[1.0], cell_type=["NK"])
    with pytest.raises(ValueError, match="never 'control'"):
        ask(model, adata[adata.obs["perturbation"] == "A"].copy(), perturbation=["A"], dose=[1.0])


@pytest.mark.parametrize("n", [0, -3, 2.5])
def test_bad_numbers_of_cells(doses_and_covariates: tuple[spd.PerturbDiff, AnnData], n: float) -> None:
    model, adata = doses_and_covariates
    with pytest.raises(ValueError, match="n_cells="):
        ask(model, adata, perturbation=["A"], dose=[1.0], n_cells=[n])


# ---- requests and outputs ------------------------------------------------------------------------------------------


def test_doses_outside_the_measured_range_are_noted(doses_and_covariates: tuple[spd.PerturbDiff, AnnData]) -> None:
    model, adata = doses_and_covariates
    predicted = ask(model, adata, perturbation=["A", "A", "B"], dose=[3.0, 200.0, 0.1])
    assert list(predicted.uns["scperturbdiff"]["doses_outside_training"]) == ["A at 200.0", "B at 0.1"]


def test_order_within_a_combination_does_not_matter(doses_and_covariates: tuple[spd.PerturbDiff, AnnData]) -> None:
    model, adata = doses_and_covariates
    first = ask(model, adata, perturbation=["A+B"], dose=["2+5"])
    second = ask(model, adata, perturbation=["B+A"], dose=["5+2"])
    assert (first.layers["counts"] != second.layers["counts"]).nnz == 0


def test_all_training_perturbations(doses_and_covariates: tuple[spd.PerturbDiff, AnnData]) -> None:
    model, adata = doses_and_covariates
    predicted = model.predict(adata, n_cells=2, seed=0, progress=False)
    asked = predicted.obs[["perturbation", "dose"]].astype(str).drop_duplicates()
    trained_on = model.populations[["perturbation", "dose"]].astype(str).drop_duplicates()
    assert set(map(tuple, asked.to_numpy())) == set(map(tuple, trained_on.to_numpy()))


def test_conditions_of_a_prediction_say_how_they_are_new() -> None:
    adata = make_cells(combination=True, features=True)
    gone = (adata.obs["perturbation"] == "B") & (adata.obs["cell_type"] == "T")
    adata = adata[~gone].copy()
    setup(adata)
    model = spd.PerturbDiff(adata, **TINY)
    model.train(seed=0, **FEW_STEPS)
    elsewhere = adata[adata.obs["perturbation"] == "control"].copy()
    elsewhere.obs["cell_type"] = elsewhere.obs["cell_type"].replace({"B cell": "NK"}).astype(str)
    predicted = model.predict(elsewhere, ["A", "B", "new"], n_cells=4, seed=0, progress=False)
    conditions = predicted.uns["scperturbdiff"]["conditions"]
    novelty = conditions.groupby(["perturbation", "cell_type"])["novelty"].first().to_dict()
    assert novelty == {
        ("A", "T"): "seen",
        ("A", "NK"): "context",
        ("B", "T"): "pair",
        ("B", "NK"): "context",
        ("new", "T"): "perturbation",
        ("new", "NK"): "perturbation",
    }
    assert conditions["unexplained_variance"].between(0, 1 + 1e-6).all()


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_cells_written_to_disk_are_the_same(
    doses_and_covariates: tuple[spd.PerturbDiff, AnnData], tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scperturbdiff.prediction._stream.BUFFER_CELLS", 10)
    model, adata = doses_and_covariates
    request, path = wanted(True, True, True), tmp_path / f"cells.{suffix}"
    kwargs = {"n_cells": 7, "n_populations": 2, "seed": 3, "progress": False}
    kept = model.predict(adata, request, **kwargs)
    written = model.predict(adata, request, output=path, **kwargs)
    assert not sparse.issparse(written.X)
    assert_same_cells(kept, written.to_memory())
    read = (read_h5ad if suffix == "h5ad" else read_zarr)(path)
    assert_same_cells(kept, read)
    pd.testing.assert_frame_equal(
        kept.uns["scperturbdiff"]["conditions"], read.uns["scperturbdiff"]["conditions"], check_dtype=False
    )
    with pytest.raises(FileExistsError, match="exists already"):
        model.predict(adata, request, output=path, **kwargs)


def test_output_that_cannot_be_written(
    doses_and_covariates: tuple[spd.PerturbDiff, AnnData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adata = doses_and_covariates
    with pytest.raises(ValueError, match=r"must end in one of"):
        model.predict(adata, wanted(True, True, False), output=tmp_path / "cells.csv", progress=False)

    def fail(*args: object) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr("scperturbdiff.prediction._stream.CellWriter.finish", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        model.predict(adata, wanted(True, True, False), output=tmp_path / "cells.h5ad", progress=False)
    assert not (tmp_path / "cells.h5ad").exists()
