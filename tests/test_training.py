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
    """In one context a perturbation held out altogether could not be predicted: replicates are held out instead."""
    table = table_of(screen(contexts=1, donors=5))
    training, held_out = split_populations(table, 0.2, seed)
    assert len(held_out) == 4
    assert set(table.component[training].ravel()) == set(table.component.ravel())
    assert sorted([*training, *held_out]) == list(range(len(table)))
    alone = table_of(screen(contexts=1, donors=1))
    assert len(split_populations(alone, 0.3, seed)[1]) == 0
    assert len(split_populations(alone, 0.3, seed, has_features=True)[1]) == 1


def test_whole_conditions_are_held_out_where_the_perturbation_is_known_elsewhere() -> None:
    table = table_of(screen(contexts=3, donors=2))
    held = table.labels.iloc[split_populations(table, 0.2, 0)[1]]
    keys = [c for c in held if c != "donor"]
    assert len(held) == 4 and (held.groupby(keys, observed=True).size() == 2).all()


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
    with pytest.raises(ValueError, match="All 8 populations would be held out.*lower validation_size"):
        trained(adata, validation_size=0.99)
