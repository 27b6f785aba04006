"""How counts respond beyond the latent space: measured on training populations, kept by generated cells."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from scipy import sparse

from scperturbdiff import PerturbDiff, datasets
from scperturbdiff import responses as module_of_responses
from scperturbdiff.counts import respond
from scperturbdiff.data import Groups
from scperturbdiff.module import PerturbDiffModule
from scperturbdiff.responses import MeasuredPopulations, ResponseSettings, measure_populations
from scperturbdiff.retrieval import FoldEvidence

if TYPE_CHECKING:
    from anndata import AnnData

    from scperturbdiff.retrieval import Novelty, Retrieval

N, GENES = 60, 4


SHARES = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]])
"""Shares of genes that the decoder expects in each batch."""


@dataclass
class Cells:
    """Counts, batches, latent vectors, and populations that share a pool of controls; some cells belong to nothing."""

    counts: np.ndarray
    batch: np.ndarray
    latent: torch.Tensor
    table: Any

    def measure(self, settings: ResponseSettings = ResponseSettings(), form: Any = np.asarray) -> MeasuredPopulations:
        return measure_populations(self.table, self.latent, form(self.counts), self.batch, self.decode, settings)

    @staticmethod
    def decode(latent: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return SHARES[batch]


@pytest.fixture
def cells() -> Cells:
    rng = np.random.default_rng(0)
    counts = rng.poisson(3.0, (N, GENES)).astype(np.float32)
    order = rng.permutation(N)
    pools = Groups.from_lists([np.sort(order[:20]), np.sort(order[20:30])])
    treated = Groups.from_lists([np.sort(order[30:35]), np.sort(order[35:50]), np.sort(order[50:52])])
    match = SimpleNamespace(groups=pools, group=np.array([1, 0, 1]))
    conditions = {"component": np.zeros((3, 1), np.int64), "dose": np.zeros((3, 1)), "context": np.arange(3)}
    table = SimpleNamespace(cells=treated, match=match, **conditions)
    latent = torch.as_tensor(rng.normal(size=(N, 3)) * np.linspace(1, 2, N)[:, None], dtype=torch.float32)
    return Cells(counts, rng.integers(0, 2, N), latent, table)


@pytest.mark.parametrize("prior_counts", [5.0, 0.5])
def test_residuals_are_posterior_ratios_of_counts_less_those_of_the_controls(cells: Cells, prior_counts: float) -> None:
    found = cells.measure(ResponseSettings(prior_counts=prior_counts)).responses.residual
    expected = cells.counts.sum(1, keepdims=True) * SHARES[cells.batch].numpy()

    def log_ratio(rows: np.ndarray) -> np.ndarray:
        return np.log((cells.counts[rows].sum(0) + prior_counts) / (expected[rows].sum(0) + prior_counts))

    for i in range(3):
        by_hand = log_ratio(cells.table.cells[i]) - log_ratio(cells.table.match.groups[cells.table.match.group[i]])
        np.testing.assert_allclose(found[i], by_hand, atol=2e-3)


@pytest.mark.parametrize("chunk", [7, 60])
@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix])
def test_residuals_do_not_depend_on_how_counts_are_read(
    cells: Cells, chunk: int, form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = cells.measure().responses
    monkeypatch.setattr(module_of_responses, "CHUNK", chunk)
    found = cells.measure(form=form).responses
    np.testing.assert_allclose(found.residual, whole.residual, atol=2e-3)
    np.testing.assert_allclose(found.library, whole.library, rtol=1e-6)


def test_library_sizes_are_compared_with_those_of_the_controls(cells: Cells) -> None:
    found = cells.measure().responses.library
    library = cells.counts.sum(1)
    for i in range(3):
        controls = cells.table.match.groups[cells.table.match.group[i]]
        assert found[i] == pytest.approx(
            np.log(library[cells.table.cells[i]].mean() / library[controls].mean()), rel=1e-5
        )


@pytest.mark.parametrize("pseudo_cells", [5.0, 50.0])
def test_shifts_spreads_and_noise_are_those_of_the_cells(cells: Cells, pseudo_cells: float) -> None:
    """From the definitions; the spread is drawn towards that of the controls by so many cells."""
    measured = cells.measure(ResponseSettings(pseudo_cells=pseudo_cells))
    latent, pools, found = cells.latent.double().numpy(), cells.table.match.groups, measured.responses
    variances = [latent[pools[g]].var(axis=0).mean() * len(pools[g]) for g in range(2)]
    within = sum(variances) / (30 - len(variances))
    for i in range(3):
        treated, controls = latent[cells.table.cells[i]], latent[pools[cells.table.match.group[i]]]
        np.testing.assert_allclose(found.shift[i], treated.mean(0) - controls.mean(0), atol=1e-6)
        np.testing.assert_allclose(measured.treated_mean[i], treated.mean(0), atol=1e-6)
        np.testing.assert_allclose(found.conditions.control_mean[i], controls.mean(0), atol=1e-6)
        noise = within * (1 / len(treated) + 1 / len(controls))
        assert found.conditions.noise[i] == pytest.approx(noise, rel=1e-5)
        before, after = (x.var(axis=0, ddof=1).mean() for x in (controls, treated))
        mean = ((len(treated) - 1) * after + pseudo_cells * before) / (len(treated) - 1 + pseudo_cells)
        assert found.spread[i] == pytest.approx(0.5 * np.log(mean / before), rel=1e-4)


def test_measuring_changes_nothing_it_is_given(cells: Cells) -> None:
    before = cells.counts.copy(), cells.latent.clone(), cells.batch.copy()
    cells.measure()
    assert np.array_equal(cells.counts, before[0]) and torch.equal(cells.latent, before[1])
    assert np.array_equal(cells.batch, before[2])


@pytest.fixture
def module() -> PerturbDiffModule:
    torch.manual_seed(0)
    small = {"n_hidden": 8, "generator_kwargs": {"width": 4, "n_layers": 1, "n_heads": 1}}
    return PerturbDiffModule(GENES, 1, 2, 1, **small, vae_kwargs={"use_layer_norm": "none"}).eval()


START, DRAWN = torch.tensor([[30.0, 50.0, 40.0, 80.0]]), 40_000


def generated(
    module: PerturbDiffModule, start: torch.Tensor = START, residual: torch.Tensor | None = None, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean counts of cells that start from these counts, and the mean of the VAE for their library size."""
    latent, batch = torch.zeros(DRAWN, 2), torch.zeros(DRAWN)
    before, after = module.decode(latent, batch).share, module.decode(latent, batch, residual)
    return respond(start.expand(DRAWN, -1), before, after, **kwargs).mean(0), start.sum() * before[0]


def test_counts_follow_the_residual_and_keep_the_library_size(module: PerturbDiffModule) -> None:
    residual = torch.tensor([0.7, 0.0, -0.7, 0.2])
    _, decoded = generated(module)
    after = decoded * residual.exp()
    after = after * decoded.sum() / after.sum()
    theta = module.vae.px_r.detach().exp()
    weight = (theta + START[0]) / (theta + decoded)
    mean, _ = generated(module, residual=residual, repeated=torch.ones(DRAWN, dtype=torch.bool))
    torch.testing.assert_close(mean, after * weight, rtol=0.02, atol=0)
    mean, _ = generated(module, residual=residual)
    kept = torch.where(after < decoded, START[0] * after / decoded, START[0] + (after - decoded) * weight)
    torch.testing.assert_close(mean, kept, rtol=0.02, atol=0)


def test_counts_of_cells_that_do_not_move_stay(module: PerturbDiffModule) -> None:
    mean, _ = generated(module)
    assert torch.equal(mean, START[0])


@pytest.mark.parametrize("ratio", [0.6, 1.6])
def test_library_sizes_are_those_of_the_controls_times_the_ratio(module: PerturbDiffModule, ratio: float) -> None:
    """Exactly where the counts of the control cell are what the VAE expects."""
    _, decoded = generated(module)
    mean, _ = generated(module, decoded.round()[None], library_ratio=ratio)
    torch.testing.assert_close(mean, ratio * decoded, rtol=0.03, atol=0)


@pytest.fixture(scope="module")
def screen() -> AnnData:
    return datasets.simulate(
        n_contexts=2, n_perturbations=3, n_cells_per_population=100, n_genes=60, n_batches=1, seed=3
    )


@pytest.fixture(scope="module")
def model(screen: AnnData) -> PerturbDiff:
    """A model whose VAE was trained far too little, so that there is much to correct."""
    scvi.settings.seed = 0
    PerturbDiff.setup_anndata(screen, "perturbation", "control", context_keys=["cell_type"])
    out = PerturbDiff(screen)
    out.train(max_epochs_vae=4, max_epochs_generator=1, plan_kwargs={"steps_per_epoch": 1}, enable_progress_bar=False)
    return out


def without_residuals(model: PerturbDiff) -> Retrieval:
    """Its retrieval, with no gene measured to differ from what is decoded, and fold changes that are not followed."""
    retrieval = model.module.retrieval
    assert retrieval is not None and retrieval.responses.residual.any()
    nothing = np.zeros_like(retrieval.responses.residual)
    against = FoldEvidence(np.zeros(9), -np.ones(9), np.ones(9))
    folds: dict[Novelty, FoldEvidence] = dict.fromkeys(("replicate", "pair", "context", "perturbation"), against)
    return replace(retrieval, responses=replace(retrieval.responses, residual=nothing), folds=folds)


def test_measured_populations_are_met_where_the_decoder_misses_them(
    model: PerturbDiff, screen: AnnData, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = screen.obs.loc[screen.obs["perturbation"] != "control", ["perturbation", "cell_type"]].drop_duplicates()

    def error() -> float:
        pred = model.predict(screen, wanted, n_cells=200, seed=0, progress=False)
        out = 0.0
        for perturbation, cell_type in wanted.to_numpy():
            shares = []
            for cells in (pred, screen):
                here = (cells.obs["perturbation"] == perturbation) & (cells.obs["cell_type"] == cell_type)
                counts = (cells.layers["counts"] if "counts" in cells.layers else cells.X)[here.to_numpy()]
                shares.append(np.asarray(counts.sum(axis=0)).ravel() / counts.sum())
            out += float(np.square(np.log1p(1e4 * shares[0]) - np.log1p(1e4 * shares[1])).mean())
        return out

    corrected = error()
    monkeypatch.setattr(model.module, "retrieval", without_residuals(model))
    assert corrected < 0.6 * error()


def test_cells_with_more_rna_are_predicted_with_more_counts(screen: AnnData) -> None:
    """One perturbation doubles counts in the context where it was measured, and in the other when predicted."""
    doubled = screen.copy()
    contexts = sorted(doubled.obs["cell_type"].unique())
    first = (doubled.obs["perturbation"] == "P01").to_numpy()
    doubled.X = sparse.csr_matrix(doubled.X)
    doubled.X = sparse.diags(np.where(first, 2.0, 1.0)) @ doubled.X
    held = first & (doubled.obs["cell_type"] == contexts[1]).to_numpy()
    train, controls = doubled[~held].copy(), doubled[(doubled.obs["perturbation"] == "control").to_numpy()].copy()
    PerturbDiff.setup_anndata(train, "perturbation", "control", context_keys=["cell_type"])
    model = PerturbDiff(train)
    model.train(max_epochs_vae=4, max_epochs_generator=1, plan_kwargs={"steps_per_epoch": 1}, enable_progress_bar=False)
    pred = model.predict(controls, ["P01", "P02"], n_cells=200, seed=0, progress=False)
    library = pd.Series(np.asarray(pred.layers["counts"].sum(axis=1)).ravel())
    mean = library.groupby([pred.obs["perturbation"].to_numpy(), pred.obs["cell_type"].to_numpy()]).mean()
    before = pd.Series(np.asarray(controls.X.sum(axis=1)).ravel()).groupby(controls.obs["cell_type"].to_numpy()).mean()
    assert mean["P01", contexts[0]] == pytest.approx(2 * before[contexts[0]], rel=0.15)
    assert mean["P01", contexts[1]] == pytest.approx(2 * before[contexts[1]], rel=0.2)  # carried over whole
    assert mean["P02", contexts[1]] == pytest.approx(before[contexts[1]], rel=0.15)


def test_controls_are_not_corrected(model: PerturbDiff, screen: AnnData, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"n_cells": 50, "seed": 0, "progress": False}
    with_residuals = model.predict(screen, ["control"], **asked)
    monkeypatch.setattr(model.module, "retrieval", without_residuals(model))
    without = model.predict(screen, ["control"], **asked)
    assert (with_residuals.layers["counts"] != without.layers["counts"]).nnz == 0
