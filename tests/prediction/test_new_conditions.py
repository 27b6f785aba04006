"""Cells of new conditions: without controls of their own, as uncertain as they are, state by state."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tests.helpers import FEW_STEPS, assert_same_cells
from tests.screens import screen, tiny

import scperturbdiff as spd
from scperturbdiff.retrieval import Retrieval, States
from scperturbdiff.training._states import StateSearch

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

ASKED: dict[str, Any] = {"progress": False, "seed": 0, "n_cells": 20}


@pytest.fixture(scope="module")
def cells() -> AnnData:
    return screen(contexts=4, donors=1, perturbations=4, n_cells=30)


def controls_of(cells: AnnData, name: str) -> AnnData:
    """Controls of the first context under another name."""
    first = cells[(cells.obs["perturbation"] == "control").to_numpy() & (cells.obs["cell_type"] == "C0").to_numpy()]
    first = first.copy()
    first.obs["cell_type"] = name
    return first


@pytest.fixture(scope="module")
def model(cells: AnnData) -> spd.PerturbDiff:
    out = tiny(cells)
    out.train(**FEW_STEPS, validation_size=0.0)
    out.module.generator_ema.network_weight.fill_(0)
    return out


def test_controls_may_be_shared_by_all_contexts() -> None:
    """Contexts that cannot be told apart by their controls, one of them new."""
    shared = screen(contexts=3, donors=1)
    spd.PerturbDiff.setup_anndata(shared, "perturbation", "control", context_keys=["cell_type"], control_match_keys=[])
    model = tiny(shared)
    model.train(**FEW_STEPS)
    retrieval = model.module.retrieval
    assert retrieval is not None and np.ptp(retrieval.responses.conditions.control_mean, axis=0).max() == 0
    for context in ("C1", "new"):
        for n_populations in (None, 2):
            found = model.predict(controls_of(shared, context), ["P0"], n_populations=n_populations, **ASKED)
            assert np.isfinite(found.obsm["X_perturbdiff"]).all() and np.isfinite(found.X.data).all()


def test_a_network_is_left_out_where_training_could_not_rehearse() -> None:
    """One context says nothing of what the network does in another one."""
    cells = screen(contexts=1, donors=2)
    model = tiny(cells)
    model.train(**FEW_STEPS, validation_size=0.0)
    model.module.generator_ema.network_weight.fill_(1)
    for name, is_used in (("C0", True), ("new", False)):
        with_network, without = (
            model.predict(controls_of(cells, name), ["P0"], n_steps=n_steps, **ASKED).obsm["X_perturbdiff"]
            for n_steps in (1, 0)
        )
        assert np.array_equal(with_network, without) is not is_used


# ---- doubt -----------------------------------------------------------------------------------------------------------


def means(model: spd.PerturbDiff, controls: AnnData, n: int = 40, seed: int = 0) -> np.ndarray:
    found = model.predict(controls, ["P0"], n_populations=n, **(ASKED | {"seed": seed}))
    return found.obsm["X_perturbdiff"].reshape(n, ASKED["n_cells"], -1).mean(1)


@pytest.fixture
def doubtful(model: spd.PerturbDiff, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Factors of the errors of predictions for new contexts; seen conditions have none."""
    factors = np.array([[40.0, 0.0], [0.0, 40.0], [0.0, 0.0], [0.0, 0.0]])
    retrieval = replace(model.module.retrieval, doubt={"context": factors})
    monkeypatch.setattr(model.module, "retrieval", retrieval)
    return factors


def test_draws_of_a_new_context_vary_more(
    model: spd.PerturbDiff, cells: AnnData, doubtful: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the same control cells; by the covariance of errors times the variance of the prediction."""
    seen, new = (means(model, controls_of(cells, name)).var(0) for name in ("C0", "new"))
    assert (new[:2] > 5 * seen[:2]).all() and (new[2:] < 3 * seen[2:]).all()
    monkeypatch.setattr(model.module, "retrieval", replace(model.module.retrieval, doubt={}))
    plain = means(model, controls_of(cells, "new")).var(0)
    assert (plain[:2] < 0.5 * new[:2]).all()


def test_draws_of_a_new_context_are_repeatable(model: spd.PerturbDiff, cells: AnnData, doubtful: np.ndarray) -> None:
    controls = controls_of(cells, "new")
    first, again, other = (means(model, controls, n=3, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    np.testing.assert_array_equal(means(model, controls, n=2, seed=1), first[:2])


def test_the_best_guess_is_not_moved_by_doubt(
    model: spd.PerturbDiff, cells: AnnData, doubtful: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    controls = controls_of(cells, "new")
    guess = model.predict(controls, ["P0"], **ASKED)
    monkeypatch.setattr(model.module, "retrieval", replace(model.module.retrieval, doubt={}))
    assert_same_cells(model.predict(controls, ["P0"], **ASKED), guess)


def test_doubt_comes_instead_of_the_offset_of_replicates(
    model: spd.PerturbDiff, cells: AnnData, doubtful: np.ndarray
) -> None:
    generator = model.module.generator_ema
    kept = generator.replicate_factors.clone()
    new, seen = controls_of(cells, "new"), controls_of(cells, "C0")
    before = means(model, new, n=2), means(model, seen, n=2)
    try:
        generator.set_replicates(5 * torch.eye(4)[:, :2])
        np.testing.assert_allclose(means(model, new, n=2), before[0], atol=1e-5)
        assert np.abs(means(model, seen, n=2) - before[1]).max() > 0.1
    finally:
        generator.set_replicates(kept)


def gene_means(model: spd.PerturbDiff, controls: AnnData, n: int | None = 30, seed: int = 0) -> np.ndarray:
    """Mean counts of genes in each draw, `(n, n_genes)`."""
    found = model.predict(controls, ["P0"], n_populations=n, **(ASKED | {"seed": seed}))
    return found.layers["counts"].toarray().reshape(n or 1, ASKED["n_cells"], -1).mean(1)


def test_draws_are_off_in_their_genes_as_left_out_conditions_were(
    model: spd.PerturbDiff, cells: AnnData, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not the best guess; the same seed gives the same cells, also after saving."""
    retrieval, controls = model.module.retrieval, controls_of(cells, "new")
    assert retrieval is not None and set(retrieval.folds) >= {"context", "pair", "replicate"}

    def with_errors(constant: float) -> None:
        folds = {way: replace(of, constant=constant, proportional=0.0) for way, of in retrieval.folds.items()}
        monkeypatch.setattr(model.module, "retrieval", replace(retrieval, folds=folds, doubt={}))

    with_errors(0.0)
    exact, guess = gene_means(model, controls), gene_means(model, controls, None)
    with_errors(0.5)
    off = gene_means(model, controls)
    often = exact.mean(0) > np.median(exact.mean(0))
    assert np.median(off[:, often].var(0) / exact[:, often].var(0)) > 2
    np.testing.assert_array_equal(gene_means(model, controls, None), guess)
    np.testing.assert_array_equal(gene_means(model, controls), off)
    assert not np.array_equal(gene_means(model, controls, seed=1), off)
    model.save(tmp_path / "model")
    again = spd.PerturbDiff.load(tmp_path / "model", adata=False)
    np.testing.assert_array_equal(gene_means(again, controls), off)


def test_errors_of_fold_changes_are_those_of_populations_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fold changes that nothing explains, the same for no two populations, are errors; those that all share are not."""
    found = []
    for spread in (0.0, 1.0):
        cells = screen(contexts=4, donors=1, perturbations=4, n_cells=60)
        model = tiny(cells)
        rng = np.random.default_rng(0)
        genes = np.where(rng.random((4, 4, cells.n_vars)) < 0.5, np.exp(spread), np.exp(-spread))
        counts = cells.X.toarray() if hasattr(cells.X, "toarray") else np.asarray(cells.X)
        for i in range(4):
            for j in range(4):
                here = (cells.obs["perturbation"] == f"P{i}") & (cells.obs["cell_type"] == f"C{j}")
                counts[here.to_numpy()] = rng.poisson(5 * genes[i, j], (int(here.sum()), cells.n_vars))
        counts[(cells.obs["perturbation"] == "control").to_numpy()] = rng.poisson(
            5, (int((cells.obs["perturbation"] == "control").sum()), cells.n_vars)
        )
        cells.X = counts.astype(np.float32)
        model = tiny(cells)
        model.train(**FEW_STEPS, validation_size=0.0)
        assert model.module.retrieval is not None
        found.append(model.module.retrieval.folds["context"])
        alone = model.module.retrieval.folds["replicate"]  # one population of each condition: no replicates vary
        assert alone.exact and alone.constant == alone.proportional == 0
    assert found[0].constant < 0.02 and found[1].constant + found[1].proportional > 0.2


@pytest.mark.parametrize("fold_weight", [0.0, 1.0])
def test_populations_predicted_as_their_controls_are_named(
    fold_weight: float,
    cells: AnnData,
    model: spd.PerturbDiff,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where nothing is known beyond the noise of sampling, copies of controls come out, and not without a word."""
    monkeypatch.setattr(Retrieval, "fold_weight", lambda *_: fold_weight)  # one leaves factors of rounding
    retrieval, states = model.module.retrieval, model.module.by_state
    assert retrieval is not None
    known = retrieval.responses
    silent = replace(
        known,
        shift=known.shift * 0,
        spread=known.spread * 0,
        residual=known.residual * 0,
        fold=known.fold * 0,
    )
    model.module.retrieval, model.module.by_state = replace(retrieval, responses=silent), None
    try:
        with caplog.at_level("WARNING", logger="scperturbdiff"):
            pred = model.predict(controls_of(cells, "C0"), ["P0", "control"], **ASKED)
            model.predict(
                controls_of(cells, "C0"), ["P0"], **ASKED, n_populations=2
            )  # of one replicate each: no draws vary
    finally:
        model.module.retrieval, model.module.by_state = retrieval, states
    assert "1 of 2 populations are predicted as their controls" in caplog.text
    assert "1 of 1 populations are predicted as their controls" in caplog.text
    assert pred.uns["scperturbdiff"]["predicted_as_controls"] == ["P0, C0, D0"]
    caplog.clear()
    pred = model.predict(controls_of(cells, "C0"), ["P0"], **ASKED)
    assert not caplog.text and not pred.uns["scperturbdiff"]["predicted_as_controls"]


# ---- states ----------------------------------------------------------------------------------------------------------


def test_a_model_of_states_is_saved_and_loaded(cells: AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def two(self: StateSearch) -> Any:
        return self.fit(States.fit(self.populations.latent, 2, 2.0))

    monkeypatch.setattr(StateSearch, "choose", two)
    model = tiny(cells)
    model.train(**FEW_STEPS, validation_size=0.3)
    assert model.module.by_state is not None and set(model.module.get_extra_state()) == {"retrieval", "by_state"}
    assert len(model.module.by_state.retrieval.responses) == 2 * 16  # also those held out
    model.save(tmp_path / "m")
    again = spd.PerturbDiff.load(tmp_path / "m", adata=False)
    for name in ("C0", "new"):
        for n_populations in (None, 2):
            asked = {**ASKED, "n_populations": n_populations}
            usual = model.predict(controls_of(cells, name), ["P0", "control"], **asked)
            assert_same_cells(again.predict(controls_of(cells, name), ["P0", "control"], **asked), usual)
    alike = replace(model.module.by_state)
    model.module.by_state = None
    whole = model.predict(controls_of(cells, "new"), ["P0", "control"], **ASKED)
    model.module.by_state = alike
    by_state = model.predict(controls_of(cells, "new"), ["P0", "control"], **ASKED)
    differ = np.abs(whole.obsm["X_perturbdiff"] - by_state.obsm["X_perturbdiff"]).max(1) > 1e-6
    assert differ[(whole.obs["perturbation"] == "P0").to_numpy()].any()
    assert not differ[(whole.obs["perturbation"] == "control").to_numpy()].any()
