"""The simulated screen does what its truth says."""

from __future__ import annotations

import anndata
import numpy as np
import pytest
from scipy import sparse, stats

from scperturbdiff.data import check_counts, log_normalize
from scperturbdiff.datasets import simulate, true_log_fold_change
from scperturbdiff.datasets._cells import HIGH_MEAN, _sample_counts

SMALL = {"n_contexts": 2, "n_perturbations": 3, "n_cells_per_population": 12, "n_genes": 60}


def log_share(adata, **labels):
    """Log of each gene's share of all counts of the cells with these labels."""
    keep = np.logical_and.reduce([(adata.obs[key] == value).to_numpy() for key, value in labels.items()])
    total = np.asarray(adata.X[np.flatnonzero(keep)].sum(axis=0)).ravel()
    return np.log((total + 0.5) / total.sum()), total


def observed_change(adata, perturbation, context, **labels):
    """Log fold change of shares against the context's controls, and whether a gene has counts enough to tell."""
    after, n_after = log_share(adata, perturbation=perturbation, cell_type=context, **labels)
    before, n_before = log_share(adata, perturbation="control", cell_type=context)
    return after - before, np.minimum(n_after, n_before) > 200


def test_default_size_and_sparsity():
    adata = simulate()
    assert adata.shape == (6 * 3 * (8 * 60 + 120), 500)
    assert sparse.issparse(adata.X) and adata.X.format == "csr" and adata.X.dtype == np.int32
    check_counts(adata.X)
    assert 0.2 < adata.X.nnz / np.prod(adata.shape) < 0.4
    assert list(adata.obs.columns) == ["perturbation", "cell_type", "donor", "hidden_factor"]
    assert "perturbation_embedding" not in adata.uns


def test_seed_decides_the_cells():
    one, same, other = simulate(**SMALL, seed=3), simulate(**SMALL, seed=3), simulate(**SMALL, seed=4)
    assert (one.X != same.X).nnz == 0
    assert one.obs.equals(same.obs)
    assert (one.X != other.X).nnz > 0


def test_truth_stays_when_there_are_more_cells():
    few, many = simulate(**SMALL), simulate(**{**SMALL, "n_cells_per_population": 30})
    np.testing.assert_array_equal(few.uns["truth"]["programme"], many.uns["truth"]["programme"])
    np.testing.assert_array_equal(few.uns["truth"]["pathway_activity"], many.uns["truth"]["pathway_activity"])


def test_populations_have_the_sizes_listed():
    adata = simulate(**SMALL, n_batches=2, doses=(0.1, 1.0), combinations=1, n_control_cells=7)
    keys = ["perturbation", "cell_type", "dose", "donor"]
    found = adata.obs.groupby(keys, observed=True).size()
    listed = adata.uns["truth"]["populations"].set_index(keys)["n_cells"]
    assert len(found) == len(listed) == 2 * 2 * (1 + 4 * 2)
    assert (found.to_numpy() == listed.loc[found.index].to_numpy()).all()
    is_control = adata.obs["perturbation"] == "control"
    assert (adata.obs.loc[is_control, "dose"] == 0).all() and (adata.obs.loc[~is_control, "dose"] > 0).all()


def test_counts_follow_the_negative_binomial():
    mean = np.array([0.05, 0.7, HIGH_MEAN * 0.95, HIGH_MEAN * 1.05, 30.0], dtype=np.float32)
    size = np.array([0.7, 2.0, 3.0, 3.0, 6.0], dtype=np.float32)
    rng = np.random.default_rng(0)
    n = 40_000
    # A library size per cell would mix the law: undo it by giving each cell the rates alone.
    log_rate = np.tile(np.log(mean), (n, 1))
    counts = _sample_counts(rng, log_rate, size, float(mean.sum()), library_sd=0.0).toarray()
    for gene in range(len(mean)):
        law = stats.nbinom(size[gene], size[gene] / (size[gene] + mean[gene]))
        top = int(law.ppf(0.999)) + 1
        observed = np.bincount(counts[:, gene].clip(max=top), minlength=top + 1) / n
        expected = np.append(law.pmf(np.arange(top)), law.sf(top - 1))
        assert np.abs(observed - expected).sum() < 0.05 + 0.002 * top
        np.testing.assert_allclose(counts[:, gene].mean(), mean[gene], rtol=0.05)
        np.testing.assert_allclose(counts[:, gene].var(), mean[gene] + mean[gene] ** 2 / size[gene], rtol=0.08)


def test_effect_is_the_true_one():
    adata = simulate(n_contexts=3, n_perturbations=5, n_cells_per_population=300, n_genes=200, batch_scale=0.0)
    for context in ("C1", "C2", "C3"):
        for perturbation in ("P01", "P02", "P05"):
            change, enough = observed_change(adata, perturbation, context)
            truth = true_log_fold_change(adata, perturbation, context)
            # Shares add up to 1, so all genes are off by one common number; the median removes it.
            error = (change - truth)[enough]
            error -= np.median(error)
            assert enough.sum() > 40
            assert np.sqrt(np.mean(error**2)) < 0.3 * truth[enough].std() + 0.06
    assert not true_log_fold_change(adata, "control", "C1").any()


def test_strength_follows_the_pathway_activity():
    truth = simulate(n_contexts=30, n_perturbations=4, n_cells_per_population=1, n_genes=20).uns["truth"]
    for perturbation in range(4):
        for part in range(2):
            activity = truth["pathway_activity"][:, truth["pathway_of_perturbation"][perturbation, part]]
            assert stats.spearmanr(activity, truth["strength"][:, perturbation, part]).statistic > 0.7


def test_no_effect_when_effect_scale_is_zero():
    adata = simulate(**SMALL, effect_scale=0.0)
    assert not any(true_log_fold_change(adata, p, "C1").any() for p in ("P01", "P02", "P03"))


def test_some_cells_respond_and_the_others_are_as_controls():
    arguments = {"n_cells_per_population": 800, "n_genes": 150, "n_batches": 1, "batch_scale": 0.0, "effect_scale": 2.0}
    everybody, some = simulate(1, 3, **arguments), simulate(1, 3, **arguments, responders=0.4)
    assert "responds" not in everybody.obs
    treated, responds = (some.obs["perturbation"] != "control").to_numpy(), some.obs["responds"].to_numpy()
    assert not responds[~treated].any()
    assert responds[treated].mean() == pytest.approx(0.4, abs=4 * (0.24 / treated.sum()) ** 0.5)
    asked = (some.obs["perturbation"] == "P01").to_numpy()
    groups = {"control": some[~treated], "escaped": some[asked & ~responds], "responds": some[asked & responds]}
    groups["all"] = everybody[(everybody.obs["perturbation"] == "P01").to_numpy()]
    counts = {name: np.asarray(cells.X.sum(axis=0)).ravel() for name, cells in groups.items()}
    enough = np.min(list(counts.values()), axis=0) > 100
    assert enough.sum() > 30

    def apart(a, b):
        return np.std(np.log(counts[a][enough] / counts[b][enough]))

    assert apart("escaped", "control") < 0.1 and apart("responds", "all") < 0.1 and apart("responds", "control") > 0.3


def test_hidden_factor_moves_whole_populations():
    for law in ("gaussian", "two_modes"):
        adata = simulate(1, 2, 60, 150, n_batches=25, hidden_factor=law, hidden_scale=0.7, batch_scale=0.0)
        truth = adata.uns["truth"]
        populations = truth["populations"]
        per_cell = adata.obs.groupby(["perturbation", "donor"], observed=True)["hidden_factor"].nunique()
        assert (per_cell == 1).all()
        assert (adata.obs.loc[adata.obs["perturbation"] == "control", "hidden_factor"] == 0).all()
        values = populations.loc[populations["perturbation"] != "control", "hidden_factor"].to_numpy()
        if law == "two_modes":
            assert set(values) == {-1.0, 1.0}
        else:
            assert stats.kstest(values, "norm").pvalue > 0.01
        expression = log_normalize(adata.X)
        programme = truth["hidden_programme"] / np.linalg.norm(truth["hidden_programme"])
        for perturbation in ("P01", "P02"):
            rows = populations.index[populations["perturbation"] == perturbation]
            place = []
            for row in rows:
                donor = populations.loc[row, "donor"]
                keep = (adata.obs["perturbation"] == perturbation) & (adata.obs["donor"] == donor)
                place.append(float(np.asarray(expression[keep.to_numpy()].mean(axis=0)).ravel() @ programme))
            assert np.corrcoef(place, populations.loc[rows, "hidden_factor"])[0, 1] > 0.95


def test_without_hidden_factor_the_values_are_zero():
    assert not simulate(**SMALL).obs["hidden_factor"].any()


def test_pairs_add_up_without_interaction():
    sizes = {"n_contexts": 2, "n_perturbations": 4, "n_cells_per_population": 400, "n_genes": 150, "batch_scale": 0.0}
    adata = simulate(**sizes, combinations=2)
    mixed = simulate(**sizes, combinations=2, interaction=1.0)
    labels = [label for label in adata.uns["truth"]["labels"] if "+" in label]
    assert len(labels) == 2
    for label in labels:
        first, second = (true_log_fold_change(adata, part, "C1") for part in label.split("+"))
        np.testing.assert_allclose(true_log_fold_change(adata, label, "C1"), first + second, atol=1e-5)
        assert np.abs(true_log_fold_change(mixed, label, "C1") - first - second).max() > 0.2
        for screen in (adata, mixed):
            change, enough = observed_change(screen, label, "C1")
            assert np.corrcoef(change[enough], true_log_fold_change(screen, label, "C1")[enough])[0, 1] > 0.9


def test_effect_grows_with_dose_and_saturates():
    doses = (0.05, 0.5, 5.0, 500.0)
    adata = simulate(1, 1, 300, 150, doses=doses, batch_scale=0.0)
    truth = [true_log_fold_change(adata, "P01", "C1", dose=dose) for dose in (0.0, *doses)]
    sizes = [np.linalg.norm(effect) for effect in truth]
    assert sizes[0] == 0 and (np.diff(sizes) > 0).all()
    direction = truth[-1] / sizes[-1]
    observed = []
    for dose in doses:
        change, enough = observed_change(adata, "P01", "C1", dose=dose)
        observed.append((change[enough] - np.median(change[enough])) @ direction[enough])
    assert (np.diff(observed) > 0).all()


def test_features_inform_or_do_not():
    sizes = {"n_contexts": 1, "n_perturbations": 60, "n_cells_per_population": 1, "n_genes": 200, "n_features": 16}

    def agreement(adata):
        table, programme = adata.uns["perturbation_embedding"], adata.uns["truth"]["programme"].reshape(60, -1)
        assert table.shape == (60, 16) and list(table.index) == list(adata.uns["truth"]["perturbations"])
        upper = np.triu_indices(60, k=1)
        return stats.spearmanr(np.corrcoef(table)[upper], np.corrcoef(programme)[upper]).statistic

    assert agreement(simulate(**sizes)) > 0.4
    assert abs(agreement(simulate(**sizes, features="random"))) < 0.15


def test_h5ad_round_trip(tmp_path):
    settings = {**SMALL, "combinations": 1, "doses": (1.0, 2.0), "hidden_factor": "gaussian", "n_features": 4}
    for adata, dose in ((simulate(**settings), 2.0), (simulate(**SMALL), None)):
        adata.write_h5ad(tmp_path / "screen.h5ad")
        back = anndata.read_h5ad(tmp_path / "screen.h5ad")
        assert (back.X != adata.X).nnz == 0 and back.X.dtype == np.int32
        assert back.obs.equals(adata.obs)
        last = adata.uns["truth"]["labels"][-1]
        np.testing.assert_array_equal(
            true_log_fold_change(back, last, "C2", dose), true_log_fold_change(adata, last, "C2", dose)
        )
        assert back.uns["truth"]["populations"].equals(adata.uns["truth"]["populations"])


def test_blocks_do_not_show():
    """More cells than one block holds: every row is filled and the law does not change at the seam."""
    adata = simulate(1, 1, 2500, 1000, n_batches=1, n_control_cells=500)
    totals = np.asarray(adata.X.sum(axis=1)).ravel()
    treated = totals[500:]
    assert adata.n_obs == 3000 and totals.min() > 0
    assert stats.ks_2samp(treated[:500], treated[500:]).pvalue > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_contexts": 0}, "n_contexts=0"),
        ({"n_genes": -5}, "n_genes=-5"),
        ({"n_control_cells": 0}, "n_control_cells=0"),
        ({"combinations": 4}, "combinations=4 must be a whole number from 0 to 3"),
        ({"n_cells_per_population": 2.5}, "n_cells_per_population=2.5 must be a whole number"),
        ({"effect_scale": float("nan")}, r"effect_scale=nan must be a number in \[0, inf\)"),
        ({"n_genes": 10**6, "n_cells_per_population": 10**6}, "cells need .* GB of memory"),
        ({"seed": -1}, "seed=-1 must be a whole number"),
        ({"doses": [0.0, 1.0]}, "dose 0 is the control"),
        ({"doses": [1.0, 1.0]}, "repeated"),
        ({"doses": [1.0, float("nan")]}, "positive, finite"),
        ({"doses": []}, "positive, finite"),
        (
            {"hidden_factor": "three_modes"},
            "'three_modes' must be one of 'none', 'gaussian', 'two_modes'",
        ),
        ({"features": "good"}, "features='good'"),
        ({"n_features": -1}, "n_features=-1"),
        ({"interaction": -0.1}, "interaction=-0.1"),
        ({"batch_scale": float("inf")}, "batch_scale=inf"),
        ({"library_size": 10}, "library_size=10"),
        ({"responders": 1.2}, "responders=1.2 must be a number in \\[0, 1\\]"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        simulate(**{**SMALL, **arguments})


def test_truth_of_something_not_simulated():
    adata = simulate(**SMALL)
    with pytest.raises(ValueError, match="'P99' was not simulated.*'P01'"):
        true_log_fold_change(adata, "P99", "C1")
    with pytest.raises(ValueError, match="context 'C9'"):
        true_log_fold_change(adata, "P01", "C9")
    with pytest.raises(ValueError, match="dose must be given"):
        true_log_fold_change(adata, "P01", "C1", dose=1.0)
    with pytest.raises(ValueError, match="no 'truth'"):
        true_log_fold_change(anndata.AnnData(np.ones((1, 1))), "P01", "C1")
