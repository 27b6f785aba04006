from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scperturbdiff.evaluation.metrics import METRICS
from scperturbdiff.evaluation.metrics._cell_eval import cell_eval, to_cell_eval
from scperturbdiff.evaluation.metrics._evaluate import evaluate
from scperturbdiff.evaluation.metrics._summary import summarize_evaluation

if TYPE_CHECKING:
    from pathlib import Path

KEYS: dict[str, Any] = {
    "perturbation_key": "perturbation",
    "context_keys": "cell_type",
    "n_top": 10,
    "n_pcs": 8,
    "n_splits": 2,
}
N_GENES = 40
FAST = ["energy_distance", "pearson_delta", "mse_mean", "sd_ratio"]


def _screen(seed: int, effect: float = 1.0, n: int = 60, perturbations: tuple[str, ...] = ("control", "A", "B", "C")):
    """Counts of two cell types under three perturbations; the law does not depend on `seed`, the cells do."""
    law, rng = np.random.default_rng(0), np.random.default_rng(seed)
    base = law.gamma(2.0, 4.0, size=(2, N_GENES))
    shift = {name: law.normal(0, 1, N_GENES) * (law.random(N_GENES) < 0.4) for name in ("A", "B", "C")}
    blocks, obs = [], []
    for cell_type in range(2):
        for name in perturbations:
            mean = base[cell_type] * np.exp(effect * shift[name]) if name in shift else base[cell_type]
            size = rng.gamma(4.0, 0.25, size=(n, 1))
            blocks.append(rng.poisson(size * mean))
            obs += [(f"type{cell_type}", name)] * n
    counts = sparse.csr_matrix(np.concatenate(blocks), dtype=np.float32)
    names = [f"cell{i}" for i in range(len(obs))]
    frame = pd.DataFrame(obs, columns=["cell_type", "perturbation"], index=names).astype("category")
    cells = ad.AnnData(counts, obs=frame)
    cells.var_names = [f"gene{i}" for i in range(N_GENES)]
    cells.layers["counts"] = counts.copy()
    return cells


@pytest.fixture(scope="module")
def real() -> ad.AnnData:
    return _screen(1)


@pytest.fixture(scope="module")
def replicate() -> ad.AnnData:
    return _screen(2)


@pytest.fixture(scope="module")
def no_change() -> ad.AnnData:
    return _screen(3, effect=0.0)


@pytest.fixture(scope="module")
def table(real: ad.AnnData, replicate: ad.AnnData, no_change: ad.AnnData) -> pd.DataFrame:
    return evaluate(replicate, real, "control", baselines={"no change": no_change}, metrics="all", **KEYS)


def _value(table: pd.DataFrame, metric: str, model: str = "prediction") -> pd.Series:
    return table.query("metric == @metric and model == @model")["value"]


def test_table_is_tidy_and_complete(table: pd.DataFrame) -> None:
    columns = ["model", "role", "cell_type", "perturbation", "metric", "value", "status", "reason"]
    assert list(table.columns) == [*columns, "n_pred", "n_real", "n_control"]
    assert (table["status"] == np.where(table["value"].isna(), "undefined", "ok")).all()
    assert (table["reason"].ne("") == table["value"].isna()).all()
    assert len(table) == 3 * 6 * len(METRICS)
    assert not table.duplicated(["model", "cell_type", "perturbation", "metric"]).any()
    assert set(table["model"]) == {"prediction", "no change", "ceiling"}
    assert "control" not in set(table["perturbation"])
    numbers = table.groupby("model")[["n_pred", "n_real", "n_control"]].first()
    assert numbers.loc["prediction"].tolist() == [60, 60, 60] and numbers.loc["ceiling"].tolist() == [30, 30, 60]
    low, high = (table["metric"].map({n: getattr(m, side) for n, m in METRICS.items()}) for side in ("low", "high"))
    inside = table["value"].between(low, high) | table["value"].isna()
    assert inside.all(), table[~inside]


def test_a_replicate_is_near_the_ceiling_and_no_change_is_far(table: pd.DataFrame) -> None:
    assert _value(table, "energy_distance").abs().max() < 0.2
    assert _value(table, "energy_distance", "no change").min() > 1
    assert _value(table, "pearson_delta").min() > 0.9
    assert _value(table, "r2_delta", "no change").max() < 0.2
    assert _value(table, "de_direction").min() > 0.9
    assert _value(table, "discrimination_l2").tolist() == [1.0] * 6
    summary = summarize_evaluation(table).set_index(["model", "metric"])
    normalized = summary["normalized"].drop(index="ceiling", level="model")
    assert normalized["no change"].dropna().abs().max() < 1e-12
    strong = ["energy_distance", "mmd", "pearson_delta", "mse_mean", "de_auroc", "sliced_wasserstein"]
    assert (normalized["prediction"][strong] > 0.9).all()
    assert (summary.loc["ceiling", "normalized"].dropna() == 1).all()


def test_undefined_values_are_nan_and_counted(real: ad.AnnData, replicate: ad.AnnData) -> None:
    lone = (replicate.obs["cell_type"] == "type0") & (replicate.obs["perturbation"] == "A")
    keep = ~lone.to_numpy()
    keep[np.flatnonzero(lone)[0]] = True
    got = evaluate(replicate[keep], real, "control", baselines=None, ceiling=False, metrics="all", **KEYS)
    single = got.query("n_pred == 1").set_index("metric")["value"]
    assert single[["energy_distance", "mmd", "sd_ratio", "correlation_distance", "de_overlap"]].isna().all()
    assert single[["pearson_delta", "mse_mean", "sliced_wasserstein"]].notna().all()
    summary = summarize_evaluation(got).set_index("metric")
    assert summary.loc["energy_distance", ["n_conditions", "n_nan"]].tolist() == [6, 1]
    assert np.isfinite(summary.loc["energy_distance", "mean"])
    assert summary["normalized"].isna().all() and summary["floor"].isna().all()


def test_order_of_cells_and_genes_does_not_matter(real: ad.AnnData, replicate: ad.AnnData, table: pd.DataFrame) -> None:
    rng = np.random.default_rng(5)
    shuffled = replicate[:, rng.permutation(N_GENES)].copy()
    got = evaluate(shuffled, real, "control", baselines=None, ceiling=False, metrics="all", **KEYS)
    expected = table.query("model == 'prediction'").reset_index(drop=True)
    pd.testing.assert_frame_equal(got, expected, rtol=1e-5)
    # Projections are fitted in the order of the cells: equal up to the solver's rounding, not more.
    cells = replicate[rng.permutation(replicate.n_obs)]
    keys = ["cell_type", "perturbation", "metric"]
    by_name = [
        frame[frame["metric"].isin(FAST)].set_index(keys)["value"].sort_index()
        for frame in (evaluate(cells, real, "control", baselines=None, ceiling=False, metrics="all", **KEYS), expected)
    ]
    pd.testing.assert_series_equal(*by_name, rtol=1e-5, atol=1e-6)


def test_dense_backed_extra_genes_and_control_cells_as_anndata(
    real: ad.AnnData, replicate: ad.AnnData, tmp_path: Path
) -> None:
    keywords = {**KEYS, "baselines": None, "metrics": FAST}
    expected = evaluate(replicate, real, "control", **keywords)
    dense, wide = real.copy(), replicate.copy()
    dense.X = dense.X.toarray()
    extra = ad.AnnData(sparse.csr_matrix((wide.n_obs, 3)), obs=wide.obs[[]], var=pd.DataFrame(index=["x", "y", "z"]))
    extra.layers["counts"] = extra.X.copy()
    wide = ad.concat([extra, wide], axis=1, merge="first")
    pd.testing.assert_frame_equal(evaluate(wide, dense, "control", **keywords), expected, rtol=1e-5)

    path = tmp_path / "real.h5ad"
    real.write_h5ad(path)
    backed = ad.read_h5ad(path, backed="r")
    pd.testing.assert_frame_equal(evaluate(replicate, backed, "control", **keywords), expected, rtol=1e-5)

    is_control = real.obs["perturbation"] == "control"
    controls, treated = real[is_control].copy(), real[~is_control].copy()
    del controls.obs["perturbation"]
    pred = replicate[replicate.obs["perturbation"] != "control"]
    pd.testing.assert_frame_equal(evaluate(pred, treated, controls, **keywords), expected, rtol=1e-5)


def test_the_seed_decides_and_the_input_is_left_alone(real: ad.AnnData, replicate: ad.AnnData) -> None:
    before = real.to_df(), real.obs.copy()
    keywords = {**KEYS, "baselines": None, "metrics": FAST}
    one = evaluate(replicate, real, "control", seed=1, **keywords)
    pd.testing.assert_frame_equal(one, evaluate(replicate, real, "control", seed=1, **keywords))
    two = evaluate(replicate, real, "control", seed=2, **keywords)
    assert not np.allclose(_value(one, "mse_mean", "ceiling"), _value(two, "mse_mean", "ceiling"))
    pd.testing.assert_frame_equal(real.to_df(), before[0])
    pd.testing.assert_frame_equal(real.obs, before[1])


def test_the_ceiling_of_a_condition_does_not_depend_on_the_others(real: ad.AnnData, replicate: ad.AnnData) -> None:
    keywords = {**KEYS, "baselines": None, "metrics": ["mse_mean"], "train": real, "allow_overlap": True}
    whole = evaluate(replicate, real, "control", **keywords).query("perturbation == 'B'").reset_index(drop=True)
    part = evaluate(replicate[replicate.obs["perturbation"] == "B"], real, "control", **keywords)
    pd.testing.assert_frame_equal(whole, part)


def test_several_models_and_fitted_baselines(real: ad.AnnData, replicate: ad.AnnData, no_change: ad.AnnData) -> None:
    class Resample:
        calls: list[tuple[int, list[str], int]] = []

        def predict(self, controls: ad.AnnData, perturbations: list[str], *, n_cells: int, seed: int) -> ad.AnnData:
            assert set(controls.obs["perturbation"]) == {"control"} and controls.obs["cell_type"].nunique() == 1
            self.calls.append((controls.n_obs, list(perturbations), n_cells))
            rows = np.random.default_rng(seed).choice(controls.n_obs, n_cells)
            parts = []
            for name in perturbations:
                part = ad.AnnData(controls.X[rows], var=controls.var)
                part.obs["cell_type"] = controls.obs["cell_type"].to_numpy()[rows].astype(str)
                part.obs["perturbation"] = name
                part.layers["counts"] = part.X.copy()
                parts.append(part)
            return ad.concat(parts, index_unique="-")

    models = {"good": replicate, "bad": no_change}
    table = evaluate(models, real, "control", baselines={"resample": Resample()}, metrics=FAST, **KEYS)
    roles = table.drop_duplicates("model").set_index("model")["role"].to_dict()
    assert roles == {"good": "prediction", "bad": "prediction", "resample": "baseline", "ceiling": "ceiling"}
    assert Resample.calls == [(60, ["A", "B", "C"], 60)] * 2
    assert (_value(table, "mse_mean", "good").to_numpy() < _value(table, "mse_mean", "resample").to_numpy()).all()


def test_default_baselines_have_as_many_cells_as_predictions(real: ad.AnnData, replicate: ad.AnnData) -> None:
    """Each condition its own number, none more than there are controls: else metrics of means compare noise."""
    label = replicate.obs["cell_type"].astype(str) + replicate.obs["perturbation"].astype(str)
    place = replicate.obs.groupby(label, observed=True).cumcount()
    some = replicate[(place < label.map(dict.fromkeys(label, 60) | {"type0A": 13, "type1B": 7})).to_numpy()]
    keywords = {**KEYS, "ceiling": False, "metrics": ["mse_mean"], "allow_overlap": True}
    table = evaluate(some, real, "control", train=real.copy(), **keywords)
    keys = ["cell_type", "perturbation"]
    asked = table.query("role == 'prediction'").set_index(keys)["n_pred"]
    rules = table.query("role == 'baseline'").set_index(keys)
    assert (rules["n_pred"] == np.minimum(asked[rules.index], rules["n_control"])).all()
    assert {7, 13} < set(rules["n_pred"])


@pytest.mark.parametrize("name", ["status", "model", "n_real", "value"])
def test_columns_of_the_result_are_no_contexts(real: ad.AnnData, replicate: ad.AnnData, name: str) -> None:
    cells = [a.copy() for a in (replicate, real)]
    for adata in cells:
        adata.obs[name] = adata.obs["cell_type"]
    with pytest.raises(ValueError, match=rf"names \['{name}'\]|names .*{name}"):
        evaluate(*cells, "control", **{**KEYS, "context_keys": [name]})


def test_default_baselines_are_fitted_on_the_training_cells(real: ad.AnnData, replicate: ad.AnnData) -> None:
    held_out = (real.obs["cell_type"] == "type1") & real.obs["perturbation"].isin(["A", "B"])
    asked = replicate[(replicate.obs["cell_type"] == "type1") & replicate.obs["perturbation"].isin(["A", "B"])]
    keywords = {**KEYS, "ceiling": False, "metrics": ["mse_mean", "r2_delta", "de_overlap"]}
    table = evaluate(asked, real, "control", train=real[~held_out.to_numpy()].copy(), **keywords)
    names = set(table.query("role == 'baseline'")["model"])
    assert {"no_change", "perturbation_mean_shift", "context_mean_shift"} <= names
    additive = table[table["model"] == "additive"]  # A and B were never seen in type1
    assert additive["value"].isna().all() and set(additive["status"]) == {"unavailable"}
    assert additive["reason"].str.contains("cannot predict perturbation 'A'").any()
    assert table.drop(additive.index)["value"].notna().all() and len(table) == (len(names) + 1) * 2 * 3
    mse = table.query("metric == 'mse_mean'").groupby("model")["value"].mean()
    assert mse["prediction"] < mse["perturbation_mean_shift"] < mse["no_change"]

    # Without A anywhere in training, rules that look A up have no value for it.
    unseen = real[(real.obs["perturbation"] != "A") & ~held_out.to_numpy()].copy()
    table = evaluate(asked, real, "control", train=unseen, **keywords).query("metric == 'mse_mean'")
    values = table.set_index(["model", "perturbation"])["value"]
    assert np.isnan(values["perturbation_mean_shift", "A"]) and np.isfinite(values["perturbation_mean_shift", "B"])
    assert np.isfinite(values["context_mean_shift", "A"]) and np.isfinite(values["no_change", "A"])
    assert summarize_evaluation(table).set_index("model").loc["perturbation_mean_shift", "n_nan"] == 1


def test_doses_define_conditions_but_not_controls(real: ad.AnnData, replicate: ad.AnnData) -> None:
    observed, predicted = real.copy(), replicate.copy()
    for cells, kind in ((observed, np.float64), (predicted, np.float32)):
        dose = np.where(np.arange(cells.n_obs) % 2, 0.1, 1.0).astype(kind)
        cells.obs["dose"] = np.where(cells.obs["perturbation"] == "control", kind(0), dose)
    keywords = {**KEYS, "baselines": None, "ceiling": False, "metrics": FAST, "condition_keys": ["dose"]}
    table = evaluate(predicted, observed, "control", **keywords)
    assert table[["cell_type", "dose", "perturbation"]].drop_duplicates().shape == (12, 3)
    assert set(table["dose"]) == {"0.1", "1"} and set(table["n_control"]) == {60} and set(table["n_real"]) == {30}


def test_doses_are_equal_where_the_model_takes_them_for_equal(real: ad.AnnData, replicate: ad.AnnData) -> None:
    """To 12 digits, and told apart beyond the 6 that were once read."""
    cells = [replicate.copy(), real.copy()]
    for part in cells:
        part.obs["dose"] = np.where(np.arange(part.n_obs) % 2, 1.0000001, 1.0000002) * (
            part.obs["perturbation"] != "control"
        )
    keywords = {**KEYS, "baselines": None, "ceiling": False, "metrics": FAST, "condition_keys": "dose"}
    assert set(evaluate(*cells, "control", **keywords)["dose"]) == {"1.0000001", "1.0000002"}
    cells[0].obs["dose"] *= 1 + 1e-14
    assert set(evaluate(*cells, "control", **keywords)["dose"]) == {"1.0000001", "1.0000002"}


def _dosed(seed: int, n: int = 120) -> ad.AnnData:
    """Responses are strong at dose 10 and absent at dose 0.1."""
    low, high = _screen(seed, 0.0, n), _screen(seed + 50, 1.0, n)
    for cells, dose in ((low, 0.1), (high, 10.0)):
        cells.obs["dose"] = np.where(cells.obs["perturbation"] == "control", 0.0, dose)
    return ad.concat([low, high], index_unique="-", merge="same")


def test_default_baselines_know_the_dose() -> None:
    train, real, pred = _dosed(1), _dosed(3), _dosed(5)
    held = (pred.obs["cell_type"] == "type1").to_numpy()
    keywords = {**KEYS, "train": train, "metrics": ["mse_mean"], "ceiling": False}

    def floors(**keys: Any) -> pd.Series:
        table = evaluate(pred[held], real, "control", **keywords, **keys)
        return table.query("model == 'perturbation_mean_shift'").groupby("dose")["value"].mean()

    found = floors(condition_keys="dose")
    pd.testing.assert_series_equal(found, floors(dose_key="dose"))
    named = {"train": train.copy(), "real": real.copy(), "pred": pred[held].copy()}
    for cells in named.values():
        cells.obs["dose"] = cells.obs["dose"].astype(str).astype("category")
    blind = evaluate(
        named["pred"], named["real"], "control", **{**keywords, "train": named["train"]}, condition_keys="dose"
    )
    blind = blind.query("model == 'perturbation_mean_shift'").groupby("dose")["value"].mean()
    assert found["0.1"] < 0.7 * blind["0.1"]  # text is no dose, unless it is called one


def test_a_number_that_cannot_be_a_dose_is_none(real: ad.AnnData, replicate: ad.AnnData) -> None:
    cells = [replicate.copy(), real.copy()]
    for part in cells:
        part.obs["hours"] = np.where(np.arange(part.n_obs) % 2, 24.0, 0.0)  # also in controls
    keywords = {**KEYS, "baselines": None, "ceiling": False, "metrics": FAST}
    assert set(evaluate(*cells, "control", condition_keys="hours", **keywords)["hours"]) == {"0", "24"}
    with pytest.raises(ValueError, match=r"real.*'hours'.*controls must have dose 0|controls must have dose 0"):
        evaluate(*cells, "control", dose_key="hours", **keywords)


def test_one_perturbation_in_several_spellings(real: ad.AnnData, replicate: ad.AnnData, table: pd.DataFrame) -> None:
    def renamed(cells: ad.AnnData, **names: str) -> ad.AnnData:
        out = cells.copy()
        out.obs["perturbation"] = out.obs["perturbation"].astype(str).replace(names)
        return out

    expected = table.query("model == 'prediction'").reset_index(drop=True)
    keywords = {**KEYS, "baselines": None, "ceiling": False, "metrics": "all"}
    got = evaluate(renamed(replicate, A="control+A", B="B+control"), real, "control", **keywords)
    pd.testing.assert_frame_equal(got, expected)
    got = evaluate(replicate, renamed(real, A="A + control"), "control", **keywords)
    pd.testing.assert_frame_equal(got, expected)
    pairs = [renamed(replicate, A="C+D"), renamed(real, A="D+C")]
    assert "C+D" in set(evaluate(*pairs, "control", **keywords)["perturbation"])
    with pytest.raises(ValueError, match="real cells lack conditions"):
        evaluate(*pairs, "control", separator=None, **keywords)


def test_rules_that_are_left_out_are_named_with_the_reason(
    real: ad.AnnData, replicate: ad.AnnData, caplog: pytest.LogCaptureFixture
) -> None:
    def pairs(cells: ad.AnnData) -> ad.AnnData:
        out = cells.copy()
        out.obs["perturbation"] = out.obs["perturbation"].astype(str).replace({"A": "B;C"})
        return out

    truth, pred = pairs(real), pairs(replicate)
    train = truth[(truth.obs["perturbation"] != "B;C").to_numpy()].copy()
    pred = pred[(pred.obs["perturbation"] == "B;C").to_numpy()].copy()
    keywords = {**KEYS, "train": train, "metrics": ["mse_mean"], "ceiling": False}
    table = evaluate(pred, truth, "control", separator=";", **keywords)
    assert "additive" in set(table["model"]) and "additive" not in table.attrs["left_out"]
    assert "B;C" in table.attrs["left_out"]["perturbation_mean_shift"]

    table = evaluate(pred, truth, "control", **keywords)  # the pair is a name, of which training knows nothing
    assert table.loc[table["model"] == "additive", "value"].isna().all()
    why = table.attrs["left_out"]["additive"]
    assert "none of 2 conditions" in why and "cannot predict perturbation 'B;C'" in why
    assert any("'additive' has no values" in record.getMessage() for record in caplog.records)

    del train.obs["cell_type"]
    table = evaluate(pred, truth, "control", **keywords)
    rules = table[table["role"] == "baseline"]
    assert set(rules["status"]) == {"not fitted"} and rules["value"].isna().all() and (rules["n_pred"] == 0).all()
    assert rules["reason"].str.contains("context_keys='cell_type' is not a column").all()
    summary = summarize_evaluation(table).set_index("model")
    assert summary.loc["additive", "status"] == "not fitted" and summary.loc["prediction", "status"] == "ok"
    assert "context_keys='cell_type'" in summary.loc["additive", "reason"] and summary["floor"].isna().all()
    assert all("context_keys='cell_type' is not a column" in why for why in table.attrs["left_out"].values())
    assert len(table.attrs["left_out"]) == 7


def test_contexts_that_are_numbers(real: ad.AnnData, replicate: ad.AnnData) -> None:
    cells = [real.copy(), replicate.copy(), _screen(4)]
    for part, kind in zip(cells, (np.float64, np.float32, np.float64), strict=True):
        part.obs["cell_type"] = part.obs["cell_type"].map({"type0": 0.1, "type1": 24.0}).astype(kind)
    table = evaluate(cells[1], cells[0], "control", train=cells[2], metrics=["mse_mean"], ceiling=False, **KEYS)
    assert set(table["cell_type"]) == {"0.1", "24"} and "perturbation_mean_shift" in set(table["model"])
    assert table["value"].notna().all()


def test_no_contexts(real: ad.AnnData, replicate: ad.AnnData) -> None:
    table = evaluate(
        replicate, real, "control", perturbation_key="perturbation", baselines=None, metrics=FAST, ceiling=False
    )
    assert table[["perturbation", "n_pred", "n_control"]].drop_duplicates().to_numpy().tolist() == [
        ["A", 120, 120], ["B", 120, 120], ["C", 120, 120],
    ]  # fmt: skip


def test_wrong_input_is_named(real: ad.AnnData, replicate: ad.AnnData, no_change: ad.AnnData) -> None:
    def run(pred: Any = replicate, truth: Any = real, control: Any = "control", **changes: Any) -> None:
        evaluate(pred, truth, control, **{**KEYS, "baselines": None, "metrics": FAST, "ceiling": False, **changes})

    with pytest.raises(ValueError, match=r"real cells lack .* 2 of 6 wanted: cell_type=type0, perturbation=B; "):
        run(truth=real[real.obs["perturbation"] != "B"])
    with pytest.raises(ValueError, match="no real control cells for contexts, 1 of 2 wanted: cell_type=type1"):
        run(truth=real[(real.obs["perturbation"] != "control") | (real.obs["cell_type"] == "type0")])
    with pytest.raises(ValueError, match="1 of the 40 genes wanted are missing from pred.var_names: 'gene7'"):
        run(pred=replicate[:, replicate.var_names != "gene7"])
    with pytest.raises(KeyError, match="context_keys='celltype' is not a column of real.obs. Did you mean 'cell_type'"):
        run(context_keys=["celltype"])
    with pytest.raises(ValueError, match="control='ctrl' is not a value of real.obs.*'control'"):
        run(control="ctrl")
    with pytest.raises(KeyError, match="layer_pred='raw' is not in pred.layers.*'counts'"):
        run(layer_pred="raw")
    logged = replicate.copy()
    logged.layers["counts"] = logged.X.log1p()
    with pytest.raises(
        ValueError, match=r"pred.layers\['counts'\] must hold raw counts, but \d+ entries are.*Pass layer_pred=\.\.\."
    ):
        run(pred=logged)
    with pytest.raises(ValueError, match="nothing to score"):
        run(pred=replicate[replicate.obs["perturbation"] == "control"])
    with pytest.raises(ValueError, match=r"pred\['half'\] lacks conditions that another model predicts, 3 of 6"):
        run(pred={"whole": replicate, "half": replicate[replicate.obs["cell_type"] == "type0"]})
    with pytest.raises(ValueError, match=r"baselines\['simple'\] lacks conditions, 2 of 6"):
        run(baselines={"simple": no_change[no_change.obs["perturbation"] != "C"]})
    with pytest.raises(ValueError, match=r"must differ.*\['prediction'\]"):
        run(baselines={"prediction": no_change})
    for argument, value in {
        "n_pcs": 0,
        "n_top": 2.5,
        "max_cells": "many",
        "n_splits": True,
        "target_sum": 0,
        "de_method": "z-test",
        "ceiling": 1,
        "seed": -1,
        "control": 0,
    }.items():
        with pytest.raises((TypeError, ValueError), match=f"{argument}={value!r} must be "):
            run(**{argument: value})
    with pytest.raises(TypeError, match="real must be an AnnData, not str"):
        evaluate(replicate, "real.h5ad", "control", **KEYS)
    with pytest.raises(TypeError, match=r"baselines\['x'\] must be an AnnData"):
        run(baselines={"x": 3})
    with pytest.raises(TypeError, match="but pred is"):
        run(pred=replicate.to_df())
    with pytest.raises(ValueError, match="baselines='all' is unknown"):
        run(baselines="all")
    with pytest.raises(ValueError, match="label of the control cells"):
        run(control=real[real.obs["perturbation"] == "control"], train=no_change, baselines="default",
            pred=replicate[replicate.obs["perturbation"] != "control"])  # fmt: skip
    with pytest.raises(ValueError, match="Unknown metrics"):
        run(metrics=["accuracy"])
    missing = replicate.copy()
    missing.obs["cell_type"] = missing.obs["cell_type"].where(np.arange(missing.n_obs) > 4)
    with pytest.raises(ValueError, match=r"pred.obs\['cell_type'\] is missing \(NaN\) for 5 cells"):
        run(pred=missing)


# ---- the summary


def _hand_made(values: dict[str, list[float]], metric: str = "mse_mean") -> pd.DataFrame:
    roles = {"prediction": "prediction", "ceiling": "ceiling"}
    return pd.DataFrame(
        [
            {"model": model, "role": roles.get(model, "baseline"), "perturbation": f"p{i}", "metric": metric,
             "value": value, "n_pred": 9, "n_real": 9, "n_control": 9}
            for model, column in values.items()
            for i, value in enumerate(column)
        ]
    )  # fmt: skip


def test_summary_by_hand() -> None:
    table = _hand_made({"prediction": [2, 4], "b1": [6, 6], "b2": [4, 6], "ceiling": [1, 1]})
    summary = summarize_evaluation(table).set_index("model")
    assert summary.loc["prediction", "mean"] == 3 and set(summary["floor"]) == {"b2"}
    assert summary.loc["prediction", "normalized"] == pytest.approx((3 - 5) / (1 - 5))
    assert summary.loc["b1", "normalized"] == pytest.approx(-0.25)
    # Resampling two conditions gives each pair of them: the interval spans the two.
    assert summary.loc["prediction", ["low", "high"]].tolist() == [2, 4]
    named = summarize_evaluation(table, floor="b1").set_index("model")
    assert named.loc["prediction", "normalized"] == pytest.approx(3 / 5) and named.loc["b1", "normalized"] == 0


def test_summary_turns_metrics_the_right_way() -> None:
    higher = _hand_made({"prediction": [0.8, 0.6], "b": [0.2, 0.2], "ceiling": [1.0, 1.0]}, "pearson_delta")
    assert summarize_evaluation(higher).loc[0, "normalized"] == pytest.approx(0.5 / 0.8)
    ratio = _hand_made({"prediction": [0.8, 1.2], "b": [0.5, 1.5], "ceiling": [1.0, 1.0]}, "sd_ratio")
    summary = summarize_evaluation(ratio).set_index("model")
    assert summary.loc["prediction", "mean"] == 1 and summary.loc["prediction", "normalized"] == pytest.approx(0.6)


def test_summary_compares_on_shared_conditions() -> None:
    nan = float("nan")
    table = _hand_made({"prediction": [2, nan, 3], "b1": [6, 8, 0], "b2": [nan, nan, nan], "ceiling": [1, 1, nan]})
    summary = summarize_evaluation(table).set_index("model")
    assert summary.loc["prediction", "floor"] == "b1" and summary.loc["b2", "n_nan"] == 3
    assert summary.loc["prediction", "normalized"] == pytest.approx((6 - 2) / (6 - 1))
    assert np.isnan(summary.loc["prediction", "normalized_low"])  # one shared condition
    assert np.isnan(summary.loc["b2", "mean"]) and np.isnan(summary.loc["b2", "normalized"])
    worse = summarize_evaluation(_hand_made({"prediction": [2.0], "b": [1.0], "ceiling": [1.0]}))
    assert worse["normalized"].isna().all()
    # Better on average, but not beyond doubt: 0.9 against 1 here, 1.1 against 1 there.
    close = summarize_evaluation(_hand_made({"prediction": [2, 2, 2], "b": [1, 1, 1.5], "ceiling": [0.9, 1.1, 1.1]}))
    assert close["normalized"].notna().all() and not close["separated"].any()
    assert close[["normalized_low", "normalized_high"]].isna().all(axis=None)


def test_bootstrap_interval_covers() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        table = _hand_made({"prediction": rng.normal(3, 1, 25).tolist()})
        low, high = summarize_evaluation(table, n_bootstrap=300).loc[0, ["low", "high"]]
        hits += low <= 3 <= high
    assert 50 <= hits <= 60


def test_summary_refuses_bad_input() -> None:
    table = _hand_made({"prediction": [1.0]})
    with pytest.raises(ValueError, match=r"floor='x' is not a model of the table: \['prediction'\]"):
        summarize_evaluation(table, floor="x")
    with pytest.raises(KeyError, match="value"):
        summarize_evaluation(table.drop(columns="value"))
    with pytest.raises(ValueError, match="Unknown metric 'mae'"):
        summarize_evaluation(_hand_made({"prediction": [1.0]}, "mae"))


# ---- cell-eval2


def test_what_is_handed_to_cell_eval(real: ad.AnnData, replicate: ad.AnnData) -> None:
    pred = replicate[replicate.obs["perturbation"] == "B"]
    pred = pred[:, np.random.default_rng(0).permutation(N_GENES)].copy()
    pairs = to_cell_eval(pred, real, "control", perturbation_key="perturbation", context_keys="cell_type")
    assert list(pairs) == [("type0",), ("type1",)]
    for (cell_type,), (predicted, observed) in pairs.items():
        for cells in (predicted, observed):
            assert cells.var_names.equals(real.var_names)
            assert cells.obs["perturbation"].value_counts().to_dict() == {"B": 60, "control": 60}
            np.testing.assert_allclose(np.expm1(cells.X.toarray()).sum(axis=1), 1e4, rtol=1e-4)
        rows = (real.obs["cell_type"] == cell_type) & (real.obs["perturbation"] == "control")
        counts = real[rows].X.toarray()
        for cells in (predicted, observed):
            expected = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
            np.testing.assert_allclose(cells[cells.obs["perturbation"] == "control"].X.toarray(), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="real cells lack conditions of pred, 2 of 2"):
        to_cell_eval(pred, real[real.obs["perturbation"] != "B"], "control",
                     perturbation_key="perturbation", context_keys="cell_type")  # fmt: skip


def test_cell_eval2_agrees_on_what_both_define(real: ad.AnnData) -> None:
    pytest.importorskip("cell_eval2", reason="cell-eval2 comes with the extra eval")
    pairs = {
        "delta_pearson": "pearson_delta",
        "expr_mse": "mse_mean",
        "pds_l1": "discrimination_l1",
        "pds_l2": "discrimination_l2",
        "pds_cosine": "discrimination_cosine",
        "de_wilcoxon_sig_recall": "de_recall",
    }
    # A poor prediction, so that there is something to disagree about: perturbations mixed up in one cell type.
    poor = _screen(9, effect=0.3)
    mixed = poor.obs["perturbation"].map({"A": "B", "B": "C", "C": "A", "control": "control"})
    poor.obs["perturbation"] = mixed.where(poor.obs["cell_type"] == "type0", poor.obs["perturbation"])
    keys = {"perturbation_key": "perturbation", "context_keys": "cell_type"}
    theirs = cell_eval(poor, real, "control", metrics=list(pairs), **keys)
    ours = evaluate(
        poor, real, "control", baselines=None, ceiling=False, metrics=pairs.values(), de_method="wilcoxon", **keys
    )
    index = ["cell_type", "perturbation", "metric"]
    both = theirs.replace({"metric": pairs}).merge(ours, on=index, suffixes=("_theirs", "_ours"))
    assert len(both) == 6 * len(pairs) and both.groupby("metric")["value_ours"].nunique().gt(1).all()
    np.testing.assert_allclose(both["value_ours"], both["value_theirs"], rtol=1e-3, atol=1e-6)
