"""Baselines change what they say they change, and nothing else."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scperturbdiff import baselines, splits
from scperturbdiff.data import log_normalize
from scperturbdiff.datasets import simulate
from scperturbdiff.evaluation.baselines._means import mean_rows, mean_share, resample, shares_for_log_means

KEYS = {"perturbation_key": "perturbation", "control": "control", "context_keys": ["cell_type"]}
EVERY = {
    "no_change": baselines.NoChange,
    "mean": baselines.PerturbationMeanShift,
    "nearest": lambda: baselines.PerturbationMeanShift("nearest"),
    "own": lambda: baselines.PerturbationMeanShift("own"),
    "context": baselines.ContextMeanShift,
    "fold": baselines.CountFoldChange,
    "additive": baselines.Additive,
}


@pytest.fixture(scope="module")
def screen():
    return simulate(4, 4, 60, 150, n_batches=2, combinations=2, n_features=6, batch_scale=0.0)


@pytest.fixture(scope="module")
def split(screen):
    return splits.hold_out_pairs(screen, perturbation_key="perturbation", control="control", context_keys=["cell_type"])


def log_mean(adata, layer=None):
    return mean_rows(log_normalize(adata.layers[layer] if layer else adata.X))


def cells_of(adata, perturbation, context):
    return adata[((adata.obs["perturbation"] == perturbation) & (adata.obs["cell_type"] == context)).to_numpy()]


def shift_of(adata, perturbation, context):
    return log_mean(cells_of(adata, perturbation, context)) - log_mean(cells_of(adata, "control", context))


def agreement_of_shifts(found, expected, profile):
    """Pearson correlation over the genes whose mean can go where it should (not below 0)."""
    possible = profile + expected > 0
    return np.corrcoef(found[possible], expected[possible])[0, 1]


# ----------------------------------------------------------------------------------------------------- sampling


def test_equal_shares_leave_counts_alone(screen):
    counts = sparse.csr_matrix(screen.X[:200])
    share = mean_share(counts)
    assert share.sum() == pytest.approx(1.0)
    assert (resample(counts, share, share, np.random.default_rng(0)) != counts).nnz == 0


def test_resampling_reaches_the_shares_and_keeps_library_sizes(screen):
    counts = sparse.csr_matrix(screen.X[:240])
    before = mean_share(counts)
    rng = np.random.default_rng(0)
    after = before * np.exp(rng.normal(0, 1, before.size))
    after[:5] = 0.002  # also genes that may be absent from the controls
    after /= after.sum()
    out = resample(counts, before, after, rng)
    common = after > 0.003
    np.testing.assert_allclose(mean_share(out)[common], after[common], rtol=0.12)
    totals = [np.asarray(m.sum(axis=1)).ravel() for m in (counts, out)]
    np.testing.assert_allclose(totals[1].mean(), totals[0].mean(), rtol=0.03)
    assert np.corrcoef(*totals)[0, 1] > 0.7
    assert out.data.min() > 0


def test_gained_counts_are_independent_poisson_numbers():
    """A gene that controls lack is Poisson with mean library size x share in every cell."""
    library = np.repeat([100, 400], 5000)
    counts = sparse.csr_matrix(np.column_stack([library, np.zeros_like(library)]))
    out = resample(counts, np.array([1.0, 0.0]), np.array([0.99, 0.01]), np.random.default_rng(0)).toarray()
    for size in (100, 400):
        gained = out[library == size, 1]
        assert gained.mean() == pytest.approx(0.01 * size, rel=0.05)
        assert gained.var() == pytest.approx(0.01 * size, rel=0.08)
        assert out[library == size, 0].mean() == pytest.approx(0.99 * size, rel=0.005)


def test_log_means_come_out_as_wanted(screen):
    controls = sparse.csr_matrix(cells_of(screen, "control", "C1").X)
    goal = log_mean(cells_of(screen, "P01", "C1"))
    rng = np.random.default_rng(0)
    share = shares_for_log_means(controls, goal, rng)
    found = mean_rows(log_normalize(resample(controls, mean_share(controls), share, rng)))
    before = np.abs(mean_rows(log_normalize(controls)) - goal)
    assert share.sum() == pytest.approx(1.0)
    assert np.abs(found - goal).mean() < 0.2 * before.mean()


# ----------------------------------------------------------------------------------------------------- the rules


def test_no_change_returns_control_cells(screen):
    controls = cells_of(screen, "control", "C2")
    fitted = baselines.NoChange().fit(screen, **KEYS)
    predicted = fitted.predict(controls, ["P01"], seed=0)
    assert (predicted.layers["counts"] != controls.X).nnz == 0
    assert list(predicted.obs["control_cell"]) == list(controls.obs_names)
    more = fitted.predict(controls, ["P01"], n_cells=2 * controls.n_obs + 7, seed=0)
    used = more.obs["control_cell"].value_counts()
    assert len(used) == controls.n_obs and set(used) == {2, 3}


def test_mean_shift_is_the_mean_over_other_contexts(screen):
    """Also where the pair itself is in training: its own cells must not count."""
    controls = cells_of(screen, "control", "C3")
    expected = np.mean([shift_of(screen, "P01", context) for context in ("C1", "C2", "C4")], axis=0)
    predicted = baselines.PerturbationMeanShift().fit(screen, **KEYS).predict(controls, ["P01"], n_cells=600, seed=0)
    found = log_mean(predicted, "counts") - log_mean(controls)
    with_own = (3 * expected + shift_of(screen, "P01", "C3")) / 4
    assert agreement_of_shifts(found, expected, log_mean(controls)) > 0.95
    assert np.polyfit(expected, found, 1)[0] == pytest.approx(1.0, abs=0.15)
    assert np.corrcoef(found, expected)[0, 1] > np.corrcoef(found, with_own)[0, 1]


def test_nearest_context_is_the_one_with_the_nearest_controls(screen):
    fitted = baselines.PerturbationMeanShift("nearest").fit(screen, **KEYS)
    controls = cells_of(screen, "control", "C1")
    profile = log_mean(controls)
    distance = {c: np.linalg.norm(log_mean(cells_of(screen, "control", c)) - profile) for c in ("C2", "C3", "C4")}
    nearest = min(distance, key=lambda c: distance[c])
    found = log_mean(fitted.predict(controls, ["P01"], seed=0), "counts") - profile
    agreement = {c: agreement_of_shifts(found, shift_of(screen, "P01", c), profile) for c in distance}
    assert max(agreement, key=lambda c: agreement[c]) == nearest and agreement[nearest] > 0.9


def test_fold_change_multiplies_means(screen):
    controls = cells_of(screen, "control", "C1")
    fitted = baselines.CountFoldChange("own").fit(screen, **KEYS)
    predicted = fitted.predict(controls, ["P01"], n_cells=4 * controls.n_obs, seed=0)
    goal = mean_share(sparse.csr_matrix(cells_of(screen, "P01", "C1").X))
    found, before = mean_share(predicted.layers["counts"]), mean_share(sparse.csr_matrix(controls.X))
    common = np.minimum(goal, before) > 0.004
    np.testing.assert_allclose(np.log(found[common]), np.log(goal[common]), atol=0.15)


def test_context_mean_is_over_other_perturbations(screen):
    controls = cells_of(screen, "control", "C2")
    labels = [label for label in screen.uns["truth"]["labels"] if label != "P02"]
    expected = np.mean([shift_of(screen, label, "C2") for label in labels], axis=0)
    found = log_mean(baselines.ContextMeanShift().fit(screen, **KEYS).predict(controls, ["P02"], seed=0), "counts")
    assert np.corrcoef(found - log_mean(controls), expected)[0, 1] > 0.95


def test_additive_sums_components_in_any_order(screen):
    label = next(name for name in screen.uns["truth"]["labels"].tolist() if "+" in name)
    train = screen[(screen.obs["perturbation"] != label).to_numpy()]
    first, second = label.split("+")
    controls = cells_of(screen, "control", "C1")
    fitted = baselines.Additive().fit(train, **KEYS)
    half = [fitted.predict(controls, [name], seed=0) for name in (label, f"{second}+{first}")]
    expected = shift_of(screen, first, "C1") + shift_of(screen, second, "C1")
    found = log_mean(half[0], "counts") - log_mean(controls)
    assert agreement_of_shifts(found, expected, log_mean(controls)) > 0.95
    assert (half[0].layers["counts"] != half[1].layers["counts"]).nnz == 0


def test_features_predict_unseen_perturbations():
    screen = simulate(1, 60, 40, 120, n_batches=1, n_features=16, batch_scale=0.0, n_control_cells=200)
    table = screen.uns["perturbation_embedding"]
    held = splits.hold_out_perturbations(screen, perturbation_key="perturbation", control="control", fraction=0.2)
    controls = screen[held.controls]
    scores = {}
    for name, baseline in {
        "mean": baselines.ContextMeanShift(),
        "ridge": baselines.FeatureRidge(table, alpha=0.1),
        "nearest": baselines.FeatureNearest(table),
        "stiff": baselines.FeatureRidge(table, alpha=1e9),
    }.items():
        baseline.fit(screen[held.train], **KEYS)
        predicted = baseline.predict(controls, held.labels, n_cells=150, seed=0)
        error = []
        for label in held.labels:
            found = log_mean(predicted[(predicted.obs["perturbation"] == label).to_numpy()], "counts")
            error.append(np.mean((found - log_mean(cells_of(screen, label, "C1"))) ** 2))
        scores[name] = np.mean(error)
    assert scores["ridge"] < 0.8 * scores["mean"]
    assert scores["ridge"] < scores["nearest"]
    assert scores["stiff"] == pytest.approx(scores["mean"], rel=0.05)


def test_nearest_features_give_that_perturbation(screen):
    table = screen.uns["perturbation_embedding"].copy()
    table.loc["NEW"] = table.loc["P03"] + 1e-4
    controls = cells_of(screen, "control", "C1")
    predicted = baselines.FeatureNearest(table).fit(screen, **KEYS).predict(controls, ["NEW"], seed=0)
    found = log_mean(predicted, "counts") - log_mean(controls)
    assert np.corrcoef(found, shift_of(screen, "P03", "C1"))[0, 1] > 0.95


def test_dose_uses_the_nearest_measured_one():
    screen = simulate(2, 2, 100, 120, n_batches=1, doses=(0.01, 100.0), batch_scale=0.0)
    fitted = baselines.PerturbationMeanShift("own").fit(screen, **KEYS, dose_key="dose")
    request = pd.DataFrame({"perturbation": "P01", "dose": [0.02, 60.0], "note": ["low", "high"]})
    predicted = fitted.predict(cells_of(screen, "control", "C1"), request, seed=0)
    assert list(predicted.obs["note"].unique()) == ["low", "high"]
    profile = log_mean(cells_of(screen, "control", "C1"))
    treated = cells_of(screen, "P01", "C1")
    shifts = {d: log_mean(treated[(treated.obs["dose"] == d).to_numpy()]) - profile for d in (0.01, 100.0)}
    for asked, used, other in ((0.02, 0.01, 100.0), (60.0, 100.0, 0.01)):
        found = log_mean(predicted[(predicted.obs["dose"] == asked).to_numpy()], "counts") - profile
        assert agreement_of_shifts(found, shifts[used], profile) > 0.85
        assert agreement_of_shifts(found, shifts[other], profile) < 0.7
    with pytest.raises(ValueError, match="missing: 'dose'"):
        fitted.predict(cells_of(screen, "control", "C1"), ["P01"])
    with pytest.raises(ValueError, match="must be finite and not negative"):
        fitted.predict(cells_of(screen, "control", "C1"), request.assign(dose=-1.0))
    with pytest.raises(ValueError, match="a dose of 0 is that, too"):
        fitted.predict(cells_of(screen, "control", "C1"), request.assign(dose=0.0))


def test_additive_finds_single_perturbations_written_beside_the_control(screen):
    """As in the files of GEARS; and lists of names, whatever characters these hold."""
    label = next(name for name in screen.uns["truth"]["labels"].tolist() if "+" in name)
    train = screen[(screen.obs["perturbation"] != label).to_numpy()].copy()
    controls = cells_of(screen, "control", "C1")
    expected = baselines.Additive().fit(train, **KEYS).predict(controls, [label], n_cells=5, seed=0).layers["counts"]
    written = train.obs["perturbation"].astype(str)
    train.obs["perturbation"] = written.where(
        written.isin(["control"]) | written.str.contains("+", regex=False), written + "+control"
    )
    fitted = baselines.Additive().fit(train, **KEYS)
    assert fitted.can_predict(label, ("C1",)) and fitted.can_predict(f"control+{label}", ("C1",))
    assert (fitted.predict(controls, [label], n_cells=5, seed=0).layers["counts"] != expected).nnz == 0
    odd = {name: f"({name}-)+/" for name in written.unique() if name != "control"}
    train.obs["perturbation"] = pd.Series(
        [[odd.get(p, p) for p in name.split("+")] for name in written], index=train.obs_names
    )
    fitted = baselines.Additive().fit(train, **KEYS)
    predicted = fitted.predict(controls, [[odd[part] for part in label.split("+")]], seed=0)
    first, second = label.split("+")
    assert list(predicted.obs["perturbation"].unique()) == [f'["{odd[first]}", "{odd[second]}"]']
    expected = sum(shift_of(screen, part, "C1") for part in label.split("+"))
    assert agreement_of_shifts(log_mean(predicted, "counts") - log_mean(controls), expected, log_mean(controls)) > 0.95


def test_without_a_separator_no_name_is_cut(screen):
    train = screen[screen.obs["perturbation"].isin(["control", "P01", "P02"]).to_numpy()].copy()
    train.obs["perturbation"] = train.obs["perturbation"].astype(str).replace({"P01": "P02+P02+"})
    fitted = baselines.PerturbationMeanShift().fit(train, **KEYS, separator=None)
    assert fitted.can_predict("P02+P02+", ("C1",)) and not fitted.can_predict("P01", ("C1",))
    with pytest.raises(ValueError, match=r"obs\['perturbation'\]='P02\+P02\+' has an empty component"):
        baselines.NoChange().fit(train, **KEYS)


def test_each_component_of_a_combination_has_its_dose(screen):
    """The shifts of single perturbations at the nearest of their own doses are added."""
    screen = simulate(2, 2, 80, 100, n_batches=1, doses=(0.01, 100.0), batch_scale=0.0)
    fitted = baselines.Additive().fit(screen, **KEYS, dose_key="dose")
    controls = cells_of(screen, "control", "C1")
    profile = log_mean(controls)

    def at(name, dose):
        cells = cells_of(screen, name, "C1")
        return log_mean(cells[(cells.obs["dose"] == dose).to_numpy()]) - profile

    wanted = pd.DataFrame({"perturbation": ["P02+P01"] * 3, "dose": ["0.02+60", [0.01, 100.0], 50.0]})
    predicted = fitted.predict(controls, wanted, n_cells=400, seed=0)
    first, second, both = (
        log_mean(predicted[predicted.obs["dose"].astype(str) == text], "counts") - profile
        for text in ("0.02+60", "100+0.01", "50.0")
    )
    expected = at("P01", 100.0) + at("P02", 0.01)
    assert (
        agreement_of_shifts(first, expected, profile) > 0.85 and agreement_of_shifts(second, expected, profile) > 0.85
    )
    assert agreement_of_shifts(both, at("P01", 100.0) + at("P02", 100.0), profile) > 0.85
    assert agreement_of_shifts(first, at("P01", 0.01) + at("P02", 100.0), profile) < 0.7


# ----------------------------------------------------------------------------------------------------- the manner


@pytest.mark.parametrize("name", EVERY)
def test_output_has_the_common_format(screen, name):
    controls = screen[(screen.obs["perturbation"] == "control").to_numpy()].copy()
    before = controls.copy()
    fitted = EVERY[name]().fit(screen, **KEYS, batch_key="donor")
    predicted = fitted.predict(controls, ["P01", "P02"], n_cells=11, seed=1)
    assert predicted.shape == (4 * 2 * 11, 150)
    assert list(predicted.obs.columns) == ["perturbation", "cell_type", "donor", "control_cell", "population"]
    assert predicted.X.dtype == np.float32 and predicted.layers["counts"].dtype == np.int32
    np.testing.assert_allclose(predicted.X.data, log_normalize(predicted.layers["counts"]).data)
    assert predicted.uns["scperturbdiff"]["baseline"] == type(fitted).__name__
    source = controls.obs.loc[predicted.obs["control_cell"]]
    for column in ("cell_type", "donor"):
        assert list(source[column].astype(str)) == list(predicted.obs[column].astype(str))
    again = fitted.predict(controls, ["P01", "P02"], n_cells=11, seed=1)
    assert (again.X != predicted.X).nnz == 0
    assert (controls.X != before.X).nnz == 0 and controls.obs.equals(before.obs)


@pytest.mark.parametrize("name", EVERY)
def test_conditions_do_not_depend_on_each_other(screen, name):
    controls = screen[(screen.obs["perturbation"] == "control").to_numpy()]
    fitted = EVERY[name]().fit(screen, **KEYS)
    together = fitted.predict(controls, ["P01", "P02"], n_cells=20, seed=5)
    alone = fitted.predict(cells_of(screen, "control", "C3"), ["P02"], n_cells=20, seed=5)
    assert (cells_of(together, "P02", "C3").layers["counts"] != alone.layers["counts"]).nnz == 0


def test_treated_cells_among_the_controls_are_not_used(screen):
    fitted = baselines.PerturbationMeanShift().fit(screen, **KEYS)
    clean = screen[(screen.obs["perturbation"] == "control").to_numpy()]
    one, two = fitted.predict(screen, ["P01"], n_cells=9, seed=0), fitted.predict(clean, ["P01"], n_cells=9, seed=0)
    assert (one.layers["counts"] != two.layers["counts"]).nnz == 0
    bare = clean.copy()
    del bare.obs["perturbation"]
    three = fitted.predict(bare, ["P01"], n_cells=9, seed=0)
    assert (one.layers["counts"] != three.layers["counts"]).nnz == 0


def test_permuted_dense_and_layered_counts_give_the_same(screen, tmp_path):
    controls = cells_of(screen, "control", "C1").copy()
    fitted = baselines.PerturbationMeanShift().fit(screen, **KEYS)
    expected = fitted.predict(controls, ["P01"], seed=0).layers["counts"]
    turned = controls[:, ::-1].copy()
    turned.X = turned.X.toarray()
    assert (fitted.predict(turned, ["P01"], seed=0).layers["counts"] != expected).nnz == 0
    layered = screen.copy()
    layered.layers["raw"], layered.X = layered.X.copy(), log_normalize(layered.X)
    fitted = baselines.PerturbationMeanShift().fit(layered, **KEYS, layer="raw")
    found = fitted.predict(cells_of(layered, "control", "C1"), ["P01"], seed=0)
    assert (found.layers["counts"] != expected).nnz == 0
    screen.write_h5ad(tmp_path / "screen.h5ad")
    backed = anndata.read_h5ad(tmp_path / "screen.h5ad", backed="r")
    fitted = baselines.PerturbationMeanShift().fit(backed, **KEYS)
    found = fitted.predict(controls, ["P01"], seed=0)
    assert (found.layers["counts"] != expected).nnz == 0


def test_without_context_keys_all_cells_are_one_context(screen):
    keys = {"perturbation_key": "perturbation", "control": "control"}
    fitted = baselines.PerturbationMeanShift().fit(screen, **keys)
    predicted = fitted.predict(screen, ["P01"], n_cells=50, seed=0)
    assert predicted.n_obs == 50 and "cell_type" not in predicted.obs


def test_default_baselines_suit_the_kind_of_split(screen, split):
    controls = screen[split.controls]
    for name, baseline in baselines.default_baselines(split.kind).items():
        baseline.fit(screen[split.train], **KEYS)
        row = split.held_out.iloc[0]
        assert baseline.can_predict(row["perturbation"], (row["cell_type"],)), name
        assert baseline.predict(controls, [row["perturbation"]], n_cells=3, seed=0).n_obs > 0
    table = screen.uns["perturbation_embedding"]
    assert "feature_ridge" in baselines.default_baselines("perturbations", table)
    assert "additive" in baselines.default_baselines("combinations")
    assert "context_mean_shift" not in baselines.default_baselines("contexts")
    with pytest.raises(ValueError, match="kind='cells'"):
        baselines.default_baselines("cells")


def test_wrong_input(screen):
    fitted = baselines.PerturbationMeanShift().fit(screen, **KEYS)
    controls = cells_of(screen, "control", "C1")
    with pytest.raises(ValueError, match="'P1' .*Did you mean 'P01'"):
        fitted.predict(controls, ["P1"])
    assert not fitted.can_predict("P1", ("C1",)) and fitted.can_predict("P01", ("C1",))
    with pytest.raises(ValueError, match="asks for 'control', the control"):
        fitted.predict(controls, ["control"])
    with pytest.raises(ValueError, match="None of the 120 cells"):
        fitted.predict(cells_of(screen, "P01", "C1"), ["P01"])
    with pytest.raises(ValueError, match="1 of the 150 genes wanted are missing.*'gene0001'"):
        fitted.predict(controls[:, 1:], ["P01"])
    with pytest.raises(ValueError, match="n_cells=0"):
        fitted.predict(controls, ["P01"], n_cells=0)
    with pytest.raises(ValueError, match="at least one row"):
        fitted.predict(controls, [])
    with pytest.raises(RuntimeError, match="not fitted"):
        baselines.NoChange().predict(controls, ["P01"])
    with pytest.raises(KeyError, match="Did you mean 'cell_type'"):
        baselines.NoChange().fit(screen, perturbation_key="perturbation", control="control", context_keys=["celltype"])
    with pytest.raises(ValueError, match="control='ctrl' is not a value of.*Did you mean 'control'"):
        baselines.NoChange().fit(screen, perturbation_key="perturbation", control="ctrl")
    halves = screen.copy()
    halves.X = halves.X * 0.5
    with pytest.raises(ValueError, match="non-integer"):
        baselines.NoChange().fit(halves, **KEYS)
    keep = ~((screen.obs["perturbation"] == "control") & (screen.obs["cell_type"] == "C1")).to_numpy()
    with pytest.raises(ValueError, match="1 contexts have treated cells but no control cell: 'C1'"):
        baselines.NoChange().fit(screen[keep], **KEYS)
    with pytest.raises(ValueError, match="contexts='all' must be one of 'mean', 'nearest', 'own'"):
        baselines.PerturbationMeanShift("all")
    keep = ~((screen.obs["perturbation"] != "control") & (screen.obs["cell_type"] == "C1")).to_numpy()
    with pytest.raises(ValueError, match="cannot predict context 'C1'"):
        baselines.ContextMeanShift().fit(screen[keep], **KEYS).predict(controls, ["P01"])
    table = screen.uns["perturbation_embedding"]
    with pytest.raises(ValueError, match="no row for 'X9'"):
        baselines.FeatureRidge(table).fit(screen, **KEYS).predict(controls, ["X9"])
    with pytest.raises(ValueError, match="alpha=0"):
        baselines.FeatureRidge(table, alpha=0)


def test_kang_nearest_context_beats_no_change(data_dir):
    path = data_dir / "kang2018_scgen_valid.h5ad"
    if not path.exists():
        pytest.skip(f"no {path.name} in the folder of real data")
    adata = anndata.read_h5ad(path)
    split = splits.hold_out_pairs(adata, **KEYS, pairs=[("stimulated", "CD14+Mono")])
    real, controls = adata[split.test], adata[split.controls]
    expected = log_mean(real) - log_mean(controls)
    scores = {}
    for name, baseline in {
        "none": baselines.NoChange(),
        "mean": baselines.PerturbationMeanShift("mean"),
        "nearest": baselines.PerturbationMeanShift("nearest"),
        "fold": baselines.CountFoldChange("nearest"),
    }.items():
        baseline.fit(adata[split.train], **KEYS)
        predicted = baseline.predict(controls, ["stimulated"], n_cells=real.n_obs, seed=0)
        found = log_mean(predicted, "counts") - log_mean(controls)
        scores[name] = np.corrcoef(found, expected)[0, 1]
    assert abs(scores["none"]) < 0.3
    assert scores["nearest"] > 0.88 and scores["fold"] > 0.85
    assert scores["nearest"] > scores["mean"] > scores["none"] + 0.3
