"""Choices of the second stage's training: what is held out, which responses are shown, precision, compilation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tests.screens import screen, table_of, tiny

from scperturbdiff.data import build_populations
from scperturbdiff.responses import measure_populations
from scperturbdiff.retrieval import Retrieval
from scperturbdiff.training import SETTINGS, rehearsed_priors, split_populations
from scperturbdiff.training._populations import hold_out, left_out_prior

if TYPE_CHECKING:
    from anndata import AnnData

    import scperturbdiff as spd

FEW_STEPS = {
    "max_epochs_vae": 1,
    "max_epochs_generator": 3,
    "enable_progress_bar": False,
    "accelerator": "cpu",
    "seed": 0,
}
PLAN = {"steps_per_epoch": 4, "n_populations": 4, "n_cells": 8}


@pytest.mark.parametrize("seed", range(3))
def test_no_perturbation_is_lost_to_validation(seed: int) -> None:
    """What is known from one condition alone cannot be held out, but where features describe it."""
    table = table_of(screen(contexts=1, donors=5))
    training, held_out = split_populations(table, 0.25, seed)
    assert len(held_out) == 0 and len(training) == len(table)
    assert len(split_populations(table, 0.25, seed, has_features=True)[1]) == 5
    table = table_of(screen(contexts=2, donors=2))  # of two conditions of a perturbation one stays
    training, held_out = split_populations(table, 0.9, seed)
    assert len(held_out) == len(table) // 2
    assert set(table.component[training].ravel()) == set(table.component.ravel())
    assert sorted([*training, *held_out]) == list(range(len(table)))


def test_whole_conditions_are_held_out() -> None:
    table = table_of(screen(contexts=3, donors=2))
    held = table.labels.iloc[split_populations(table, 0.2, 0)[1]]
    keys = [c for c in held if c != "donor"]
    assert len(held) == 4 and (held.groupby(keys, observed=True).size() == 2).all()


def test_replicates_do_not_make_more_conditions() -> None:
    """Twelve conditions are too few to hold out five of, however many donors there are."""
    for donors in (1, 4):
        table = table_of(screen(contexts=3, donors=donors))
        training, held_out, enough = hold_out(table, None, 0)
        assert not enough and len(held_out) == 0 and len(training) == len(table) == 12 * donors
        assert hold_out(table, 0.0, 0)[2] and len(hold_out(table, 0.25, 0)[1]) == 3 * donors
    few = table_of(screen(contexts=1, donors=5))
    assert not hold_out(few, 0.25, 0)[2]  # asked for, but nothing can be held out


@pytest.mark.parametrize("donors", [SETTINGS.many_replicates - 1, SETTINGS.many_replicates])
def test_many_replicates_are_shown_the_response_of_all_of_them(donors: int) -> None:
    """Leaving one of many out would tell the network which one it has to generate."""
    adata = screen(contexts=1, donors=donors)
    table = build_populations(tiny(adata).conditions, adata.obs)
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(adata.n_obs, 4))
    for i in range(len(table)):  # perturbations differ much, their replicates less
        effect = 3 * np.random.default_rng(int(table.component[i, 0])).normal(size=4)
        latent[table.cells[i]] += effect + rng.normal(size=4)
    latent = torch.as_tensor(latent, dtype=torch.float32)
    batch = np.zeros(adata.n_obs, np.int64)
    measured = measure_populations(table, latent, adata.X, batch, lambda z, _: torch.full((len(z), 12), 1 / 12))
    retrieval = Retrieval.fit(measured.responses)
    shown = rehearsed_priors(measured, retrieval, None, np.arange(len(table)), torch.device("cpu"))[0]
    all_of_them, others = (retrieval.leave_out(novelty) for novelty in ("seen", "replicate"))
    wanted = all_of_them if donors == SETTINGS.many_replicates else others
    for part in ("shift", "variance", "spread"):
        np.testing.assert_allclose(getattr(shown, part), getattr(wanted, part), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(shown.centre, measured.responses.conditions.control_mean, rtol=1e-5, atol=1e-6)
    assert not np.allclose(all_of_them.shift, others.shift, atol=0.01)
    # what is evidence is left out however many there are
    evidence = left_out_prior(measured, retrieval, None, "replicate", np.arange(len(table)))
    np.testing.assert_allclose(evidence.shift, others.shift, rtol=1e-5, atol=1e-6)


def test_only_what_features_describe_is_held_out_though_nothing_else_knows_it() -> None:
    table = table_of(screen(contexts=1, donors=1, perturbations=12))
    described = np.arange(12) < 6
    for seed in range(5):
        held_out = split_populations(table, 0.4, seed, has_features=described)[1]
        assert len(held_out) and described[table.component[held_out, 0]].all()


def test_what_training_found_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="scvi.scperturbdiff"):
        model = trained(screen())
    assert model.report_ is not None and str(model.report_) in caplog.text


def test_what_was_measured_in_another_latent_space_is_forgotten() -> None:
    model = trained(screen())
    assert model.report_ is not None and model.module.retrieval is not None
    plan = vars(model.trainer.lightning_module)  # let go of, though scvi-tools keeps it
    assert model.trainer.lightning_module.latent is None and plan["sampler"] is None
    model.train(max_epochs_vae=1, max_epochs_generator=0, enable_progress_bar=False, accelerator="cpu")
    assert model.module.retrieval is None and model.report_ is None and model.populations is None
    with pytest.raises(RuntimeError, match="Only the VAE was trained"):
        model.predict(None, ["P0"])


def trained(adata: AnnData, plan: dict | None = None, **options: Any) -> spd.PerturbDiff:
    model = tiny(adata)
    model.train(**FEW_STEPS, plan_kwargs={**PLAN, **(plan or {})}, **options)
    return model


@pytest.mark.slow
def test_compiled_training_is_the_same_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend that needs no compiler; what is saved has the usual names."""
    adata, used, compile = screen(), [], torch.compile

    def listen(model: Any, *args: Any, **kwargs: Any) -> Any:
        used.append(kwargs.get("backend"))
        return compile(model, *args, **kwargs)

    monkeypatch.setattr(torch, "compile", listen)
    initial = tiny(adata).module.generator.state_dict()
    plain = trained(adata).module.generator.state_dict()
    assert not used
    compiled = trained(adata, {"compile": "aot_eager"}).module.generator.state_dict()
    assert used == ["aot_eager"]
    assert initial.keys() == plain.keys() == compiled.keys()
    for name, value in plain.items():
        assert torch.allclose(value, compiled[name], atol=1e-4), name
    moved = [name for name, value in plain.items() if not torch.allclose(value, initial[name], atol=1e-4)]
    assert "transformer.out.weight" in moved and "transformer.project.weight" in moved


def test_mixed_precision_trains_and_predicts() -> None:
    adata = screen()
    full, mixed = trained(adata), trained(adata, precision="bf16-mixed")
    losses = [model.history_["generator_loss_train"].to_numpy(float).ravel() for model in (full, mixed)]
    assert np.isfinite(losses[1]).all() and not np.array_equal(*losses)
    assert np.abs(losses[1] / losses[0] - 1).max() < 0.3
    assert all(p.dtype == torch.float32 for p in mixed.module.parameters())
    predicted = mixed.predict(perturbations=["P0"], n_cells=6, progress=False)
    assert np.isfinite(predicted.obsm["X_perturbdiff"]).all()


@pytest.mark.parametrize("size", [-0.1, 1.0])
def test_shares_held_out_are_between_none_and_all(size: float) -> None:
    with pytest.raises(ValueError, match=rf"validation_size={size} must be a number in \[0, 1\)"):
        trained(screen(), validation_size=size)


def test_something_must_be_left_to_train_on() -> None:
    """With features every perturbation may be held out."""
    adata = screen(contexts=2, donors=1, features=True)
    with pytest.raises(ValueError, match="All 8 conditions would be held out.*lower validation_size"):
        trained(adata, validation_size=0.99)
