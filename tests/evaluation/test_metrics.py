from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, stats
from scipy.special import gamma

from scperturbdiff.evaluation.metrics import _distances as distances
from scperturbdiff.evaluation.metrics import _expression as expression
from scperturbdiff.evaluation.metrics import _registry as registry
from scperturbdiff.evaluation.metrics import _shifts as shifts
from scperturbdiff.evaluation.metrics._inputs import Projection


def _normal(n: int, d: int, seed: int, mean: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)) + mean


# ---- distances between populations


@pytest.mark.parametrize("shift", [0.0, 0.5, 2.0])
def test_energy_distance_of_gaussians_in_one_dimension(shift: float) -> None:
    # E|N(shift, 2)| in closed form, for the cross term and, at shift 0, for the within terms.
    folded = stats.foldnorm(shift / np.sqrt(2), scale=np.sqrt(2)).mean()
    expected = 2 * folded - 2 * 2 / np.sqrt(np.pi)
    got = distances.energy_distance(_normal(3000, 1, 0), _normal(2500, 1, 1, shift))
    assert got == pytest.approx(expected, abs=0.02 + 0.05 * shift)


def test_energy_distance_agrees_with_geomloss() -> None:
    geomloss = pytest.importorskip("geomloss", reason="geomloss is an oracle of the test extra")
    import torch

    x, y = _normal(40, 6, 0), _normal(55, 6, 1, 0.4)
    oracle = geomloss.SamplesLoss("energy", backend="tensorized")(torch.as_tensor(x), torch.as_tensor(y))
    # geomloss puts a floor of 1e-4 under distances, also of a cell to itself
    floor = 1e-4 * (1 / 40 + 1 / 55)
    assert distances.energy_distance(x, y, unbiased=False) == pytest.approx(2 * float(oracle) + floor, abs=1e-7)


def test_u_statistics_are_zero_on_average_and_v_statistic_is_not() -> None:
    pairs = [(_normal(16, 8, 2 * i), _normal(16, 8, 2 * i + 1)) for i in range(200)]
    u = np.array([distances.energy_distance(x, y) for x, y in pairs])
    v = np.array([distances.energy_distance(x, y, unbiased=False) for x, y in pairs])
    k = np.array([distances.mmd(x, y, 4.0) for x, y in pairs])
    assert abs(u.mean()) < 4 * u.std() / np.sqrt(len(u)) and u.min() < 0
    assert abs(k.mean()) < 4 * k.std() / np.sqrt(len(k)) and k.min() < 0
    within = 2 * gamma(4.5) / gamma(4)  # E|x - x'| of N(0, I) in 8 dimensions
    assert v.mean() == pytest.approx(within * 2 / 16, rel=0.1) and v.min() > 0


def test_energy_distance_in_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = _normal(30, 3, 0), _normal(20, 3, 1)
    whole = distances.energy_distance(x, y), distances.sliced_wasserstein(x, y)
    monkeypatch.setattr(distances, "_MAX_DISTANCES", 100)
    assert (distances.energy_distance(x, y), distances.sliced_wasserstein(x, y)) == pytest.approx(whole, rel=1e-12)


def test_mmd_of_two_far_points_pairs_is_two() -> None:
    x, y = np.zeros((4, 2)), np.full((5, 2), 100.0)
    assert distances.mmd(x, y, 1.0) == pytest.approx(2.0)
    assert distances.mmd(x, x, 1.0) == pytest.approx(0.0)


def test_median_bandwidth() -> None:
    assert distances.median_bandwidth([[0.0], [1.0], [3.0]]) == 2.0
    assert distances.median_bandwidth(_normal(500, 4, 0), max_cells=100) == pytest.approx(
        distances.median_bandwidth(_normal(500, 4, 0)), rel=0.1
    )
    assert np.isnan(distances.median_bandwidth([[1.0], [1.0]]))
    assert np.isnan(distances.mmd([[0.0], [1.0]], [[0.0], [1.0]], float("nan")))


def test_sliced_wasserstein_in_one_dimension_is_wasserstein() -> None:
    x, y = np.array([[0.0], [1.0], [5.0]]), np.array([[1.0], [2.0]])
    # Repeating each point to 6 and 6 makes the sizes equal without changing the distributions.
    expected = np.sqrt(((np.repeat([0, 1, 5], 2) - np.repeat([1, 2], 3)) ** 2).mean())
    assert distances.sliced_wasserstein(x, y) == pytest.approx(expected)
    translated = distances.sliced_wasserstein(_normal(50, 3, 0), _normal(50, 3, 0) + [3.0, 0, 0], n_projections=4000)
    assert translated == pytest.approx(np.sqrt(3.0), rel=0.05)


def test_too_few_cells_is_nan() -> None:
    one, two = np.zeros((1, 2)), np.zeros((2, 2))
    assert np.isnan(distances.energy_distance(one, two)) and np.isnan(distances.mmd(two, one, 1.0))
    assert np.isnan(distances.sliced_wasserstein(np.zeros((0, 2)), two))
    assert distances.energy_distance(one, two, unbiased=False) == 0.0


def test_distances_refuse_bad_input() -> None:
    with pytest.raises(ValueError, match="x has 2 features and y has 3"):
        distances.energy_distance(np.zeros((3, 2)), np.zeros((3, 3)))
    with pytest.raises(ValueError, match=r"y must have shape \(n_cells, n_features\)"):
        distances.mmd(np.zeros((3, 2)), np.zeros(3), 1.0)
    with pytest.raises(ValueError, match="1 entries that are NaN"):
        distances.energy_distance([[np.nan], [1.0]], [[0.0], [1.0]])
    with pytest.raises(ValueError, match="bandwidth=0"):
        distances.mmd(np.zeros((3, 2)), np.zeros((3, 2)), 0)
    with pytest.raises(ValueError, match="n_projections=0"):
        distances.sliced_wasserstein(np.zeros((3, 2)), np.zeros((3, 2)), n_projections=0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 12), m=st.integers(2, 12), d=st.integers(1, 5))
def test_order_of_cells_and_features_does_not_matter(seed: int, n: int, m: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, d)), rng.normal(size=(m, d)) + rng.normal()
    cells, features = rng.permutation(n), rng.permutation(d)
    for distance in (distances.energy_distance, lambda a, b: distances.mmd(a, b, 1.3)):
        assert distance(x[cells][:, features], y[:, features]) == pytest.approx(distance(x, y), abs=1e-10)
        assert distance(x, y) == pytest.approx(distance(y, x), abs=1e-10)
    assert distances.sliced_wasserstein(x[cells], y) == pytest.approx(distances.sliced_wasserstein(x, y), abs=1e-10)


# ---- shifts


def _cells(n: int, genes: int, seed: int, mean: float | np.ndarray = 1.0) -> sparse.csr_matrix:
    rng = np.random.default_rng(seed)
    return sparse.csr_matrix(np.log1p(rng.poisson(np.broadcast_to(mean, (n, genes)))).astype(np.float32))


def test_gene_moments_of_sparse_and_dense_agree_with_numpy() -> None:
    cells = _cells(50, 7, 0)
    for matrix in (cells, cells.toarray()):
        mean, spread = shifts.gene_moments(matrix)
        np.testing.assert_allclose(mean, cells.toarray().astype(float).mean(0), rtol=1e-9)
        np.testing.assert_allclose(spread, cells.toarray().astype(float).std(0, ddof=1), rtol=1e-9)
    assert np.isnan(shifts.gene_moments(cells[:0])[0]).all()
    assert np.isnan(shifts.gene_moments(cells[:1])[1]).all()


def test_a_perfect_prediction_and_no_change() -> None:
    control, real = _cells(200, 30, 0), _cells(200, 30, 1, np.linspace(0.5, 4, 30))
    assert shifts.pearson_delta(real, real, control) == pytest.approx(1)
    assert shifts.r2_delta(real, real, control) == pytest.approx(1)
    assert shifts.mse_mean(real, real) == 0
    assert shifts.sd_ratio(real, real) == pytest.approx(1)
    assert shifts.correlation_distance(real, real, unbiased=False) == 0
    assert np.isnan(shifts.pearson_delta(control, real, control))
    shift = shifts.mean_shift(real, control)
    assert shifts.r2_delta(control, real, control) == pytest.approx(1 - (shift**2).sum() / (29 * shift.var(ddof=1)))
    assert shifts.r2_delta(control, real, control) <= 0
    assert shifts.mse_mean(control, real) == pytest.approx((shift**2).mean())


def test_genes_given_by_position() -> None:
    control, real, pred = _cells(50, 10, 0), _cells(50, 10, 1, 3.0), _cells(50, 10, 2, 2.0)
    genes = np.array([7, 2, 5])
    few = [matrix[:, genes] for matrix in (pred, real, control)]
    assert shifts.pearson_delta(pred, real, control, genes=genes) == pytest.approx(shifts.pearson_delta(*few))
    assert shifts.r2_delta(pred, real, control, genes=genes) == pytest.approx(shifts.r2_delta(*few))
    assert shifts.sd_ratio(pred, real, genes=genes) == pytest.approx(shifts.sd_ratio(*few[:2]))
    assert shifts.correlation_distance(pred, real, genes=genes) == pytest.approx(shifts.correlation_distance(*few[:2]))


def test_sd_ratio_leaves_out_genes_constant_in_real_cells() -> None:
    real = np.array([[0.0, 0, 5], [2, 1, 5]])
    pred = np.array([[0.0, 0, 0], [1, 2, 9]])
    assert shifts.sd_ratio(pred, real) == pytest.approx((0.5 + 2) / 2)
    assert np.isnan(shifts.sd_ratio(pred, real, genes=[2]))
    assert shifts.sd_ratio(np.ones((4, 3)), real) == 0  # decoded means have no spread


def test_correlation_distance() -> None:
    rng = np.random.default_rng(0)
    independent = [rng.normal(size=(n, 12)) for n in (40, 60)]
    plain = shifts.correlation_distance(*independent, unbiased=False)
    assert plain == pytest.approx(1 / 40 + 1 / 60, rel=0.4)
    assert abs(shifts.correlation_distance(*independent)) < 0.4 * plain
    common = rng.normal(size=(60, 1))
    correlated = 2 * common + rng.normal(size=(60, 12))
    assert shifts.correlation_distance(independent[0], correlated) == pytest.approx(0.8**2, rel=0.15)
    constant = correlated.copy()
    constant[:, 3:] = 1.0
    assert shifts.correlation_distance(constant, correlated) > 0.4
    assert np.isnan(shifts.correlation_distance(np.ones((60, 12)), correlated))
    assert np.isnan(shifts.correlation_distance(correlated[:5], correlated))
    assert np.isnan(shifts.correlation_distance(correlated, correlated, genes=[0]))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_order_of_genes_does_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    control, real, pred = (rng.gamma(2.0, size=(12, 8)) for _ in range(3))
    order, cells = rng.permutation(8), rng.permutation(12)
    for metric in (shifts.pearson_delta, shifts.r2_delta):
        assert metric(pred[cells][:, order], real[:, order], control[:, order]) == pytest.approx(
            metric(pred, real, control)
        )
    for pair in (shifts.mse_mean, shifts.sd_ratio, shifts.correlation_distance):
        assert pair(pred[:, order], real[:, order]) == pytest.approx(pair(pred, real))


def test_discrimination() -> None:
    real = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, -1, -1]])
    for metric in ("l1", "l2", "cosine"):
        assert shifts.perturbation_discrimination(real, real, metric=metric) == pytest.approx([1, 1, 1, 1])
    swapped = shifts.perturbation_discrimination(real[[1, 0, 2, 3]], real)
    assert (swapped[:2] < swapped[2:]).all() and swapped[2:] == pytest.approx([1, 1])
    # All perturbations predicted alike: the average is what chance gives.
    alike = shifts.perturbation_discrimination(np.tile([0.3, 0.2, 0.1], (4, 1)), real, metric="l2")
    assert alike.mean() == pytest.approx(0.5)
    none = np.zeros((4, 3))
    assert np.isnan(shifts.perturbation_discrimination(none, real, metric="cosine")).all()
    assert shifts.perturbation_discrimination(none[:3], real[:3]) == pytest.approx([0.5] * 3)  # ties
    assert np.isnan(shifts.perturbation_discrimination(real[:1], real[:1])).all()
    with pytest.raises(ValueError, match="metric='L9' is unknown. Allowed: 'l1', 'l2', 'cosine'"):
        shifts.perturbation_discrimination(real, real, metric="L9")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(3, 3\)"):
        shifts.perturbation_discrimination(real[:3], real)


# ---- differential expression


def _screen() -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    mean = np.full(40, 2.0)
    mean[:4], mean[4:8] = 8.0, 0.3
    return _cells(80, 40, 0, mean), _cells(90, 40, 1, 2.0)


@pytest.mark.parametrize("method", ["t-test", "wilcoxon"])
def test_rank_genes_finds_the_changed_genes(method: str) -> None:
    cells, control = _screen()
    genes = [f"g{i}" for i in range(40)]
    tested = expression.rank_genes(cells, control, genes=genes, method=method)  # type: ignore[arg-type]
    assert list(tested.index) == genes
    assert set(tested.index[tested["fdr"] < 1e-4]) == set(genes[:8])
    assert (tested["score"][:4] > 0).all() and (tested["score"][4:8] < 0).all()
    assert (tested["log_fold_change"][:4] > 0.5).all()
    assert set(expression.top_genes(tested, 8)) == set(range(8))


def test_rank_genes_t_test_is_welch() -> None:
    cells, control = _screen()
    tested = expression.rank_genes(cells, control, method="t-test")
    oracle = stats.ttest_ind(cells.toarray(), control.toarray(), equal_var=False)
    np.testing.assert_allclose(tested["score"], oracle.statistic, rtol=1e-3)
    np.testing.assert_allclose(tested["p_value"], oracle.pvalue, rtol=1e-2, atol=1e-12)


@pytest.mark.parametrize("method", ["t-test", "wilcoxon"])
def test_rank_genes_is_scanpys(method: str) -> None:
    cells, control = (matrix.tolil() for matrix in _screen())
    cells[:, 20], control[:, 20] = 0, 0
    cells[:, 21], control[:, 21] = 2, 2
    both = AnnData(sparse.vstack([cells, control], format="csr"))
    both.obs["group"] = pd.Categorical(["cells"] * cells.shape[0] + ["control"] * control.shape[0])
    both.uns["log1p"] = {"base": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        sc.tl.rank_genes_groups(
            both, "group", groups=["cells"], reference="control", method=method, tie_correct=method == "wilcoxon"
        )
    oracle = sc.get.rank_genes_groups_df(both, "cells").set_index("names").loc[both.var_names]
    tested = expression.rank_genes(cells.tocsr(), control.tocsr(), method=method)  # type: ignore[arg-type]
    columns = {"scores": "score", "logfoldchanges": "log_fold_change", "pvals": "p_value", "pvals_adj": "fdr"}
    for theirs, ours in columns.items():
        np.testing.assert_allclose(tested[ours], oracle[theirs].fillna(0), rtol=1e-3, atol=1e-6, err_msg=ours)


def test_rank_genes_at_matched_numbers_of_cells() -> None:
    cells, control = _screen()
    few = expression.rank_genes(cells, control, n_cells=20, seed=3)
    pd.testing.assert_frame_equal(few, expression.rank_genes(cells, control, n_cells=20, seed=3))
    assert not few.equals(expression.rank_genes(cells, control, n_cells=20, seed=4))
    assert few["score"].abs().median() < expression.rank_genes(cells, control)["score"].abs()[:8].median()
    with pytest.raises(ValueError, match="n_cells=81 must be a whole number from 1 to 80"):
        expression.rank_genes(cells, control, n_cells=81)
    with pytest.raises(ValueError, match="method='magic'"):
        expression.rank_genes(cells, control, method="magic")  # type: ignore[arg-type]


def test_silent_genes_and_single_cells() -> None:
    cells, control = (matrix.toarray() for matrix in _screen())
    cells[:, 20], control[:, 20] = 0, 0
    tested = expression.rank_genes(cells, control)
    assert tested.loc[20, "score"] == 0 and tested.loc[20, "fdr"] == 1 and not tested.isna().any(axis=None)
    single = expression.rank_genes(cells[:1], control)
    assert single.isna().all(axis=None) and len(expression.top_genes(single, 5)) == 0
    assert np.isnan(expression.de_overlap(single, tested, k=5)) and np.isnan(expression.de_auprc(single, tested))


def _table(scores: list[float], fdr: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"score": scores, "log_fold_change": scores, "p_value": fdr, "fdr": fdr})


def test_agreement_of_two_tests_by_hand() -> None:
    real = _table([9, -8, 7, 0.1, 0.2, -0.3], [0.001, 0.001, 0.001, 0.9, 0.9, 0.9])
    pred = _table([5, 6, 0.4, -4, 0.1, 0.2], [0.001, 0.001, 0.7, 0.001, 0.9, 0.9])
    assert expression.de_overlap(pred, real, k=3) == pytest.approx(2 / 3)
    assert expression.de_precision(pred, real) == pytest.approx(2 / 3)
    assert expression.de_recall(pred.assign(fdr=[0.9, 0.9, 0.9, 0.01, 0.9, 0.01]), real) == 0
    assert expression.de_recall(pred.assign(fdr=0.001), real) == 1
    assert expression.de_direction(pred, real) == pytest.approx(2 / 3)
    assert expression.de_auroc(pred, real) == pytest.approx(8 / 9)
    assert expression.de_auprc(pred, real) == pytest.approx((1 + 1 + 3 / 4) / 3)


def test_undefined_agreement_is_nan() -> None:
    nothing = _table([0.1, 0.2, 0.3], [0.9, 0.9, 0.9])
    some = _table([5.0, 0.2, 0.3], [0.01, 0.9, 0.9])
    everything = _table([5.0, 6.0, 7.0], [0.01, 0.01, 0.01])
    assert np.isnan(expression.de_precision(nothing, some)) and expression.de_precision(some, nothing) == 0
    assert np.isnan(expression.de_recall(some, nothing)) and expression.de_recall(nothing, some) == 0
    assert np.isnan(expression.de_direction(some, nothing))
    assert np.isnan(expression.de_auroc(some, nothing)) and np.isnan(expression.de_auprc(some, everything))
    assert np.isnan(expression.de_overlap(some, some, k=3))
    with pytest.raises(ValueError, match="same genes"):
        expression.de_overlap(some, some.iloc[::-1], k=1)


# ---- the table


def test_metric_table() -> None:
    table = registry.metric_table()
    assert table.index.is_unique and set(table["better"]) == {"higher", "lower", "one"}
    assert (table["low"] < table["high"]).all()
    assert registry.METRICS["sd_ratio"].cost([0.5, 1.0, 1.5]).tolist() == [0.5, 0.0, 0.5]
    assert registry.METRICS["pearson_delta"].cost([0.5]).tolist() == [-0.5]
    assert [m.name for m in registry.choose_metrics(["mse_mean", "mmd"])] == ["mmd", "mse_mean"]
    assert [m.name for m in registry.choose_metrics("all")] == list(registry.METRICS)
    assert [m.name for m in registry.choose_metrics(None)] == table.index[table["default"]].tolist()
    assert len(registry.choose_metrics(None)) == 5
    with pytest.raises(ValueError, match=r"Unknown metrics: \['mae'\]. Allowed: energy_distance"):
        registry.choose_metrics(["mae"])


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix])
def test_components_of_cells_that_are_all_alike_are_refused(form: type) -> None:
    with pytest.raises(ValueError, match="all cells are alike"):
        Projection(form(np.full((20, 5), 2.0)))
