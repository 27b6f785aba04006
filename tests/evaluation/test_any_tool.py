"""Predictions of other tools: log-normalised cells, means, adapters; overlap of training and scored cells."""

from __future__ import annotations

from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scperturbdiff import adapters, datasets, evaluate, splits
from scperturbdiff.data import log_normalize
from scperturbdiff.evaluation.metrics import METRICS

KEYS: dict[str, Any] = {"perturbation_key": "perturbation", "context_keys": ["cell_type"]}
FAST: dict[str, Any] = {"baselines": None, "ceiling": False, "n_pcs": 8, "n_top": 10}
CONTROL = "control"


@pytest.fixture(scope="module")
def cells() -> ad.AnnData:
    """Two cell types, three drugs; 40 cells of each."""
    return datasets.simulate(
        n_contexts=2, n_perturbations=3, n_genes=60, n_cells_per_population=20, n_batches=2, seed=11
    )


@pytest.fixture(scope="module")
def real(cells: ad.AnnData) -> ad.AnnData:
    """Every second cell."""
    return cells[::2].copy()


@pytest.fixture(scope="module")
def pred(cells: ad.AnnData) -> ad.AnnData:
    """The other cells, as a good prediction: counts in X and in a layer."""
    out = cells[1::2].copy()
    out.layers["counts"] = out.X.copy()
    return out


@pytest.fixture(scope="module")
def logged(pred: ad.AnnData) -> ad.AnnData:
    out = pred.copy()
    out.X = log_normalize(out.X)
    del out.layers["counts"]
    return out


def means_of(logged: ad.AnnData) -> ad.AnnData:
    groups = logged.obs.groupby(["cell_type", "perturbation"], observed=True).indices
    obs = pd.DataFrame(list(groups), columns=["cell_type", "perturbation"])
    return ad.AnnData(np.array([logged.X[rows].mean(axis=0).A1 for rows in groups.values()]), obs, logged.var[[]])


# ---- log-normalised cells and means


def test_log_normalised_cells_score_as_their_counts_do(pred: ad.AnnData, logged: ad.AnnData, real: ad.AnnData) -> None:
    expected = evaluate(pred, real, CONTROL, **KEYS, **FAST, metrics="all")
    got = evaluate(logged, real, CONTROL, **KEYS, **FAST, metrics="all", normalized=True)
    pd.testing.assert_frame_equal(got, expected, rtol=1e-4)
    dense = logged.copy()
    dense.layers["log"], dense.X = dense.X.toarray(), None
    got = evaluate(dense, real, CONTROL, **KEYS, **FAST, metrics="all", normalized=True, layer_pred="log")
    pd.testing.assert_frame_equal(got, expected, rtol=1e-4)


def test_means_have_metrics_of_means_and_no_others(pred: ad.AnnData, logged: ad.AnnData, real: ad.AnnData) -> None:
    expected = evaluate(pred, real, CONTROL, **KEYS, **FAST, metrics="all")
    got = evaluate(means_of(logged), real, CONTROL, **KEYS, **FAST, metrics="all", means=True)
    keys = ["cell_type", "perturbation", "metric"]
    both = got.merge(expected, on=keys, suffixes=("", "_cells"))
    assert len(both) == len(expected) == len(got)
    of_means = both["metric"].map({name: metric.of_means for name, metric in METRICS.items()})
    np.testing.assert_allclose(both.loc[of_means, "value"], both.loc[of_means, "value_cells"], rtol=1e-3, atol=1e-6)
    others = both[~of_means]
    assert others["value"].isna().all() and set(others["status"]) == {"unavailable"}
    assert others["reason"].str.contains("needs cells").all()
    assert set(both.loc[of_means, "metric"]) >= {"mse_mean", "pearson_delta", "discrimination_l2"}


def test_models_of_several_kinds_in_one_call(pred: ad.AnnData, logged: ad.AnnData, real: ad.AnnData) -> None:
    models = {"ours": pred, "theirs": logged, "gears": means_of(logged)}
    how = {"normalized": "theirs", "means": ["gears", "rule"]}
    table = evaluate(
        models, real, CONTROL, **KEYS, **{**FAST, "baselines": {"rule": means_of(logged)}}, **how, metrics=["mse_mean"]
    )
    values = table.pivot(index=["cell_type", "perturbation"], columns="model", values="value")
    for name in ("theirs", "gears", "rule"):
        np.testing.assert_allclose(values[name], values["ours"], rtol=1e-3)
    with pytest.raises(ValueError, match=r"means='geras' must be True, False or names among \['ours', 'theirs'"):
        evaluate(models, real, CONTROL, **KEYS, **FAST, means="geras")
    with pytest.raises(TypeError, match="normalized=1 must be True, False or names"):
        evaluate(models, real, CONTROL, **KEYS, **FAST, normalized=1)


def _scaled(matrix: Any) -> Any:
    dense = matrix.toarray()
    return (dense - dense.mean(axis=0)) / (dense.std(axis=0) + 1e-9)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: sparse.csr_matrix(np.round(np.expm1(x.toarray()))), "look like counts. Leave normalized=True out"),
        (lambda x: x.expm1(), "there seems to be no logarithm, or another target_sum"),
        (_scaled, "they seem to be centred or scaled"),
        (lambda x: x * np.nan, "NaN or infinite"),
        (lambda x: x * 0, "all values are 0"),
        (lambda x: x * 0.3, r"is 0\.\d+ times that of the control cells, over all genes"),
    ],
)
def test_values_that_are_not_log_normalised_are_refused(
    change: Any, said: str, logged: ad.AnnData, real: ad.AnnData
) -> None:
    wrong = logged.copy()
    wrong.X = change(wrong.X)
    with pytest.raises(ValueError, match=f"^pred[.:].*{said}"):
        evaluate(wrong, real, CONTROL, **KEYS, **FAST, normalized=True)


def test_another_scale_is_warned_of(logged: ad.AnnData, real: ad.AnnData, caplog: pytest.LogCaptureFixture) -> None:
    """As where cells were normalised over more genes than are scored."""
    other = logged.copy()
    other.X = (other.X.expm1() * 0.3).log1p()
    evaluate(other, real, CONTROL, **KEYS, **FAST, metrics=["mse_mean"], normalized=True)
    assert "normalise in the same way, over these genes" in caplog.text
    assert "without its logarithm a row adds up to about 3,000" in caplog.text
    caplog.clear()
    evaluate(logged, real, CONTROL, **KEYS, **FAST, metrics=["mse_mean"], normalized=True)
    assert "normalise" not in caplog.text


def test_several_rows_are_no_means(logged: ad.AnnData, real: ad.AnnData) -> None:
    with pytest.raises(ValueError, match=r"has 2\d rows for cell_type=C1, perturbation=P01; with means=True there is"):
        evaluate(logged, real, CONTROL, **KEYS, **FAST, means=True)


# ---- overlap


def test_cells_that_are_trained_on_are_not_scored(cells: ad.AnnData, pred: ad.AnnData, real: ad.AnnData) -> None:
    keys = {**KEYS, **FAST, "metrics": ["mse_mean"]}
    treated = int((real.obs["perturbation"] != CONTROL).sum())
    with pytest.raises(ValueError, match=f"^{treated} of the {treated} real cells to score are among the treated"):
        evaluate(pred, real, CONTROL, train=cells, **keys)
    assert len(evaluate(pred, real, CONTROL, train=cells, allow_overlap=True, **keys))
    # other names and another order of genes hide nothing
    renamed = cells[:, ::-1].copy()
    renamed.obs_names = [f"new-{name}" for name in renamed.obs_names]
    with pytest.raises(ValueError, match="pass train=adata"):
        evaluate(pred, real, CONTROL, train=renamed, **keys)
    with pytest.raises(TypeError, match="allow_overlap='no' must be True or False"):
        evaluate(pred, real, CONTROL, train=renamed, allow_overlap="no", **keys)


def test_a_split_overlaps_in_controls_only(cells: ad.AnnData, pred: ad.AnnData) -> None:
    split = splits.hold_out_pairs(cells, **KEYS, control=CONTROL, seed=0)
    real = cells[split.test | split.controls].copy()
    names = set(zip(split.held_out["perturbation"], split.held_out["cell_type"], strict=True))
    asked = [pair in names for pair in zip(pred.obs["perturbation"], pred.obs["cell_type"], strict=True)]
    table = evaluate(pred[asked].copy(), real, CONTROL, train=cells[split.train].copy(), **KEYS, **FAST)
    assert table["metric"].nunique() == 5 and len(table) == 5 * len(names)


def test_equal_names_of_other_cells_are_no_overlap(pred: ad.AnnData, real: ad.AnnData) -> None:
    other = pred.copy()
    other.obs_names = list(real.obs_names[: other.n_obs])
    assert len(evaluate(pred, real, CONTROL, train=other, **KEYS, **FAST, metrics=["mse_mean"]))


# ---- adapters


def _controls(logged: ad.AnnData, cell_type: str) -> ad.AnnData:
    return logged[(logged.obs["perturbation"] == CONTROL) & (logged.obs["cell_type"] == cell_type)].copy()


def test_scgen(logged: ad.AnnData, real: ad.AnnData) -> None:
    """Cells named as the controls they come from, and a vector."""
    returned = {ct: (_controls(logged, ct), np.zeros(4)) for ct in ("C1", "C2")}
    read = [adapters.from_scgen(r, "P01", perturbation_key="perturbation") for r in returned.values()]
    assert all(set(part.obs["perturbation"]) == {"P01"} for part in read)
    assert set(returned["C1"][0].obs["perturbation"]) == {CONTROL}, "what was given is left alone"
    both = ad.concat(read, index_unique="-")
    table = evaluate(both, real, CONTROL, **KEYS, **FAST, metrics=["energy_distance"], normalized=True)
    assert table["perturbation"].tolist() == ["P01", "P01"] and np.isfinite(table["value"]).all()
    with pytest.raises(TypeError, match="pair of AnnData and latent shift"):
        adapters.from_scgen(np.zeros((3, 4)), "P01", perturbation_key="perturbation")


def test_cpa(pred: ad.AnnData, logged: ad.AnnData, real: ad.AnnData) -> None:
    """Predictions in obsm: log-normalised, or expected counts."""
    given = pred.copy()
    given.obsm["CPA_pred"] = logged.X.toarray()
    given.obsm["counts_pred"] = pred.X.toarray() + 0.0
    keys: dict[str, Any] = {**KEYS, **FAST, "metrics": ["mse_mean", "sd_ratio"], "normalized": True}
    expected = evaluate(pred, real, CONTROL, **{**keys, "normalized": False})
    for read in (
        adapters.from_cpa(given),
        adapters.from_cpa(given, key="counts_pred", counts=True),
    ):
        pd.testing.assert_frame_equal(evaluate(read, real, CONTROL, **keys), expected, rtol=1e-4)
    with pytest.raises(KeyError, match=r"key='CPA' is not in adata.obsm. There are: 'CPA_pred'"):
        adapters.from_cpa(given, key="CPA")
    given.obsm["CPA_pred"] = np.zeros((given.n_obs, 3))
    with pytest.raises(ValueError, match=r"\(\d+, 3\), not the \(\d+, 60\)"):
        adapters.from_cpa(given)


def test_cellflow(logged: ad.AnnData, real: ad.AnnData) -> None:
    """A mapping of conditions to arrays, in genes or in components."""
    conditions = pd.DataFrame({"name": ["a", "b"], "perturbation": ["P01", "P02"], "cell_type": ["C1", "C2"]})
    dense = logged.X.toarray()
    parts = {
        "a": dense[((logged.obs["perturbation"] == "P01") & (logged.obs["cell_type"] == "C1")).to_numpy()],
        "b": dense[((logged.obs["perturbation"] == "P02") & (logged.obs["cell_type"] == "C2")).to_numpy()],
    }
    read = adapters.from_cellflow(parts, conditions, condition_id_key="name", genes=logged.var_names)
    assert read.obs.groupby(["perturbation", "cell_type"], observed=True).size().to_dict() == {
        ("P01", "C1"): len(parts["a"]),
        ("P02", "C2"): len(parts["b"]),
    }
    keys: dict[str, Any] = {**KEYS, **FAST, "metrics": ["mse_mean"], "normalized": True}
    values = evaluate(read, real, CONTROL, **keys)["value"]
    assert np.isfinite(values).all()
    # all components, so that nothing is lost
    centre = dense.mean(axis=0)
    axes = np.linalg.svd(dense - centre, full_matrices=False)[2].T
    reference = ad.AnnData(dense, var=logged.var[[]])
    reference.varm["PCs"], reference.varm["X_mean"] = axes, centre[:, None]
    reduced = {name: (part - centre) @ axes for name, part in parts.items()}
    again = adapters.from_cellflow(reduced, conditions, condition_id_key="name", reference=reference)
    np.testing.assert_allclose(evaluate(again, real, CONTROL, **keys)["value"], values, rtol=1e-3)
    with pytest.raises(ValueError, match=r"conditions without a row in covariate_data\['name'\]: 'c'"):
        adapters.from_cellflow({**parts, "c": parts["a"]}, conditions, condition_id_key="name", genes=logged.var_names)
    with pytest.raises(ValueError, match=r"'a' has shape \(\d+, 60\); .* 59 genes"):
        adapters.from_cellflow(parts, conditions, condition_id_key="name", genes=logged.var_names[:-1])
    with pytest.raises(ValueError, match="pass genes="):
        adapters.from_cellflow(parts, conditions, condition_id_key="name")


def test_state(pred: ad.AnnData, logged: ad.AnnData, real: ad.AnnData) -> None:
    """Cells whose genes are numbered, their names in a column or nowhere."""
    keys: dict[str, Any] = {**KEYS, **FAST, "metrics": ["mse_mean"]}
    expected = evaluate(pred, real, CONTROL, **keys)
    bare = ad.AnnData(logged.X.toarray(), logged.obs[["perturbation", "cell_type"]].reset_index(drop=True))
    named = bare.copy()
    named.var["gene_names"] = logged.var_names.to_numpy()
    for read in (adapters.from_state(named), adapters.from_state(bare, genes=logged.var_names)):
        assert read.var_names.equals(logged.var_names)
        pd.testing.assert_frame_equal(evaluate(read, real, CONTROL, **keys, normalized=True), expected, rtol=1e-4)
    with pytest.raises(ValueError, match="no names of genes.*pass genes="):
        adapters.from_state(bare)
    with pytest.raises(ValueError, match="59 names for 60 columns"):
        adapters.from_state(bare, genes=logged.var_names[:-1])
