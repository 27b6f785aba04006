"""Tables of a trained model: fold changes, representations, novelty, summaries of draws."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scvi
from anndata import AnnData
from scipy import sparse
from tests.helpers import FEW_STEPS, TINY

import scperturbdiff as spd
from scperturbdiff.prediction import summarize_populations

GENES = 12


@pytest.fixture(scope="module")
def cells() -> AnnData:
    rng = np.random.default_rng(1)
    rows = [(p, c) for p in ("control", "A", "B", "A+B") for c in ("T", "NK") for _ in range(14)]
    obs = pd.DataFrame(rows, columns=["perturbation", "cell_type"])
    obs["donor"] = [f"d{i % 2}" for i in range(len(obs))]
    obs.index = [f"cell{i}" for i in range(len(obs))]
    mean = np.full((len(obs), GENES), 3.0)
    for part, genes in (("A", slice(0, 4)), ("B", slice(4, 8))):  # far above the noise of these few cells
        mean[obs["perturbation"].str.contains(part), genes] *= 8
    counts = sparse.csr_matrix(rng.poisson(mean).astype(np.float32))
    adata = AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(GENES)]))
    adata.uns["embedding"] = {"A": [1.0, 0.0], "B": [0.0, 1.0], "near A": [2.0, 0.1], "far": [-1.0, -1.0]}
    return adata


@pytest.fixture(scope="module")
def model(cells: AnnData) -> spd.PerturbDiff:
    scvi.settings.seed = 0
    spd.PerturbDiff.setup_anndata(
        cells,
        "perturbation",
        "control",
        context_keys=["cell_type"],
        batch_key="donor",
        perturbation_embeddings="embedding",
    )
    model = spd.PerturbDiff(cells, **TINY)
    model.train(**FEW_STEPS)
    return model


def mean(adata: AnnData, rows: np.ndarray, layer: str | None = None) -> np.ndarray:
    counts = (adata.X if layer is None else adata.layers[layer])[rows].toarray().astype(float)
    return (counts / counts.sum(1, keepdims=True) * 1e4).mean(0)


def test_fold_changes_are_those_of_the_cells(model: spd.PerturbDiff, cells: AnnData) -> None:
    kwargs = {"n_cells": 9, "seed": 4, "progress": False}
    table = model.response(cells, ["A", "far"], pseudocount=0.5, **kwargs)
    predicted = model.predict(cells, ["A", "far"], **kwargs)
    assert len(table) == 2 * 2 * GENES
    for (name, cell_type), part in table.groupby(["perturbation", "cell_type"]):
        of = ((predicted.obs["perturbation"] == name) & (predicted.obs["cell_type"] == cell_type)).to_numpy()
        control = mean(cells, cells.obs_names.get_indexer(predicted.obs["control_cell"][of].astype(str)))
        ours = mean(predicted, np.flatnonzero(of), "counts")
        np.testing.assert_allclose(part["predicted_mean"], ours, rtol=1e-5)
        np.testing.assert_allclose(part["control_mean"], control, rtol=1e-5)
        np.testing.assert_allclose(part["log2_fold_change"], np.log2((ours + 0.5) / (control + 0.5)), rtol=1e-4)
        assert part["gene"].tolist() == cells.var_names.tolist()


def test_observed_fold_changes_use_matched_controls(model: spd.PerturbDiff, cells: AnnData) -> None:
    table = model.response(cells, ["A", "far"], n_cells=3, seed=4, pseudocount=0.5, progress=False)
    part = table[(table["perturbation"] == "A") & (table["cell_type"] == "NK")]
    obs = cells.obs
    treated = np.flatnonzero((obs["perturbation"] == "A") & (obs["cell_type"] == "NK"))
    control = np.zeros(GENES)
    for donor in ("d0", "d1"):
        mine = (obs["perturbation"] == "control") & (obs["cell_type"] == "NK") & (obs["donor"] == donor)
        control += mean(cells, np.flatnonzero(mine)) * (obs["donor"].iloc[treated] == donor).mean()
    expected = np.log2((mean(cells, treated) + 0.5) / (control + 0.5))
    np.testing.assert_allclose(part["observed_log2_fold_change"], expected, rtol=1e-5)
    assert set(part["n_observed"]) == {14}
    never = table[table["perturbation"] == "far"]
    assert never["observed_mean"].isna().all() and set(never["n_observed"]) == {0}


def test_observed_cells_may_come_from_elsewhere(
    model: spd.PerturbDiff, cells: AnnData, tmp_path_factory: pytest.TempPathFactory
) -> None:
    controls = cells[cells.obs["perturbation"] == "control"].copy()
    kwargs = {"n_cells": 3, "seed": 4, "progress": False}
    usual = model.response(cells, ["A+B"], **kwargs)
    folder = tmp_path_factory.mktemp("model")
    model.save(folder / "m")
    loaded = spd.PerturbDiff.load(folder / "m", adata=False)
    pd.testing.assert_frame_equal(
        loaded.response(controls, ["B+A"], real=cells, **kwargs).iloc[:, 2:], usual.iloc[:, 2:]
    )
    assert loaded.response(controls, ["A+B"], **kwargs)["observed_mean"].isna().all()
    with pytest.raises(ValueError, match="real has no control cells"):
        loaded.response(controls, ["A"], real=cells[cells.obs["perturbation"] == "A"].copy(), **kwargs)
    bare = controls.copy()
    del bare.obs["perturbation"]
    with pytest.raises(KeyError, match="real.obs has no column 'perturbation'"):
        loaded.response(controls, ["A"], real=bare, **kwargs)
    with pytest.raises(ValueError, match="pseudocount=0 must be a number"):
        model.response(cells, ["A"], pseudocount=0, **kwargs)


def test_representation_has_a_row_per_component(model: spd.PerturbDiff) -> None:
    table = model.get_perturbation_representation()
    assert table.index.tolist() == ["A", "B", "near A", "far"]
    assert table.shape[1] == TINY["width"] and np.isfinite(table.to_numpy()).all()
    assert not np.allclose(table.loc["A"], table.loc["B"])
    more = model.get_perturbation_representation(perturbation_embeddings={"later": [0.5, 0.5]})
    assert more.index.tolist() == ["A", "B", "near A", "far", "later"]
    np.testing.assert_allclose(more.loc["near A"], table.loc["near A"], rtol=1e-5)


def test_novelty_grows_with_the_distance_of_features(model: spd.PerturbDiff) -> None:
    table = model.perturbation_novelty(["A", "near A", "far"])
    assert table["in_training"].tolist() == [True, False, False]
    assert table.loc["near A", "nearest"] == "A" and table.loc["A", "nearest"] == "B"
    assert table.loc["near A", "feature_distance"] == pytest.approx(1 - 2 / np.hypot(2, 0.1), abs=1e-6)
    assert table.loc["far", "feature_distance"] == pytest.approx(1 + 1 / np.sqrt(2), abs=1e-6)
    variance = table["unexplained_variance"]
    assert (variance >= 0).all() and variance["near A"] <= variance["far"] + 1e-9
    assert variance["far"] <= 1 + 1e-6
    with pytest.raises(KeyError, match="'nobody'"):
        model.perturbation_novelty(["nobody"])
    named = model.perturbation_novelty(["later"], perturbation_embeddings={"later": [0.0, 3.0]})
    assert named.loc["later", "nearest"] == "B"


def drawn(
    shifts: np.ndarray, n_cells: int, noise: float, seed: int = 0, n_controls: int = 10**6
) -> tuple[AnnData, AnnData]:
    """Control cells, and draws whose mean expression is the controls' plus `shifts` `(n_draws, n_genes)`.

    `n_controls` is the number that `predict` reports.
    """
    rng = np.random.default_rng(seed)
    control = AnnData(
        np.full((n_cells, shifts.shape[1]), 10.0, np.float32),
        obs=pd.DataFrame(index=[f"c{i}" for i in range(n_cells)]),
        var=pd.DataFrame(index=[f"g{i}" for i in range(shifts.shape[1])]),
    )
    base = np.log1p(1e4 / shifts.shape[1])
    x = (
        base
        + np.repeat(shifts, n_cells, axis=0)
        + noise * rng.standard_normal((len(shifts) * n_cells, shifts.shape[1]))
    )
    obs = pd.DataFrame(
        {
            "perturbation": "A",
            "control_cell": np.tile(control.obs_names, len(shifts)),
            "population": np.repeat(np.arange(len(shifts)), n_cells).astype(str),
        }
    )
    obs.index = obs.index.astype(str)
    pred = AnnData(sparse.csr_matrix(x.astype(np.float32)), obs=obs, var=control.var.copy())
    conditions = pd.DataFrame(
        {"perturbation": ["A"], "novelty": ["pair"], "unexplained_variance": [0.3], "n_controls": [n_controls]}
    )
    keys = {"perturbation": "perturbation", "control": "control", "context": [], "covariates": []}
    pred.uns["scperturbdiff"] = {"target_sum": 1e4, "conditions": conditions, "keys": keys}
    return pred, control


def test_summary_gives_back_the_law_of_the_shift() -> None:
    rng = np.random.default_rng(0)
    shifts = np.array([[1.0, -0.5, 0.0]]) + 0.3 * rng.standard_normal((200, 3))
    genes, conditions = summarize_populations(*drawn(shifts, 5, 0.0), level=0.8)
    np.testing.assert_allclose(genes["mean_shift"], shifts.mean(0), atol=1e-5)
    np.testing.assert_allclose(genes["lower"], np.quantile(shifts, 0.1, axis=0, method="weibull"), atol=1e-5)
    np.testing.assert_allclose(genes["upper"], np.quantile(shifts, 0.9, axis=0, method="weibull"), atol=1e-5)
    assert conditions["spread"].item() == pytest.approx(0.3, rel=0.1)
    assert conditions[["n_draws", "n_cells"]].iloc[0].tolist() == [200, 1000]


def test_intervals_of_few_draws_cover_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    shifts = rng.standard_normal((20, 2000))
    genes = summarize_populations(*drawn(shifts, 1, 0.0), level=0.8).genes
    further = rng.standard_normal(2000)
    inside = (genes["lower"] <= further) & (further <= genes["upper"])
    assert inside.mean() == pytest.approx(0.8, abs=0.03)


def test_spread_is_not_the_noise_of_few_cells() -> None:
    none = summarize_populations(*drawn(np.zeros((100, 20)), 5, 1.0)).conditions["spread"].item()
    some = summarize_populations(*drawn(np.linspace(-1, 1, 100)[:, None] * np.ones(20), 5, 1.0)).conditions["spread"]
    assert none < 0.15
    rng = np.random.default_rng(1)
    moved = rng.normal(0, 10**-0.5, (300, 20))  # as much as bootstrapping ten controls of variance 1
    assert summarize_populations(*drawn(moved, 5, 1.0)).conditions["spread"].item() == pytest.approx(0.32, rel=0.1)
    assert summarize_populations(*drawn(moved, 5, 1.0, n_controls=10)).conditions["spread"].item() < 0.1
    assert some.item() == pytest.approx(np.linspace(-1, 1, 100).std(ddof=1), rel=0.1)


def test_summary_flags_what_is_far_from_training() -> None:
    pred, control = drawn(np.zeros((2, 3)), 5, 1.0)
    assert not summarize_populations(pred, control).conditions["far_from_training"].item()
    assert summarize_populations(pred, control, far=0.2).conditions["far_from_training"].item()


def test_summary_of_a_prediction(model: spd.PerturbDiff, cells: AnnData) -> None:
    pred = model.predict(cells, ["A", "far"], n_cells=6, n_populations=3, seed=0, progress=False)
    genes, conditions = summarize_populations(pred, cells)
    assert len(conditions) == 4 and len(genes) == 4 * GENES
    assert (genes["lower"] <= genes["mean_shift"]).all() and (genes["mean_shift"] <= genes["upper"]).all()
    assert conditions.set_index("perturbation")["novelty"].to_dict() == {"A": "seen", "far": "perturbation"}
    one = model.predict(cells, ["A"], n_cells=6, seed=0, progress=False)
    with pytest.raises(ValueError, match="single draw"):
        summarize_populations(one, cells)
    with pytest.raises(KeyError, match="control cells of pred are not in control.obs_names"):
        summarize_populations(pred, cells[cells.obs["cell_type"] == "T"].copy())
    with pytest.raises(KeyError, match="must come from PerturbDiff.predict"):
        summarize_populations(cells, cells)
    with pytest.raises(ValueError, match="level=1.5"):
        summarize_populations(pred, cells, level=1.5)
