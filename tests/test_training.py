"""Choices of the second stage's training: what is held out, which anchors are shown, precision, compilation."""

from __future__ import annotations

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse

import scperturbdiff as spd
from scperturbdiff.data import PopulationTable, build_populations
from scperturbdiff.diffusion import GeneratorTrainingPlan, KeepBestGenerator
from scperturbdiff.diffusion._selection import is_negative
from scperturbdiff.training import MANY_REPLICATES, fit_anchor, rehearsed_anchors, split_populations

TINY = {"n_latent": 4, "n_hidden": 8, "width": 8, "n_layers": 1, "n_heads": 1}
FEW_STEPS = {
    "max_epochs_vae": 1,
    "max_epochs_generator": 3,
    "enable_progress_bar": False,
    "accelerator": "cpu",
    "seed": 0,
}
PLAN = {"steps_per_epoch": 4, "n_populations": 4, "n_cells": 8}


def screen(contexts: int, donors: int, perturbations: int = 4, n_cells: int = 5) -> AnnData:
    """Cells of every perturbation, context and donor."""
    rng = np.random.default_rng(0)
    names = ["control", *(f"P{i}" for i in range(perturbations))]
    rows = [
        (p, f"C{c}", f"D{d}") for p in names for c in range(contexts) for d in range(donors) for _ in range(n_cells)
    ]
    obs = pd.DataFrame(rows, columns=["perturbation", "cell_type", "donor"], index=[f"c{i}" for i in range(len(rows))])
    counts = sparse.csr_matrix(rng.poisson(3, (len(obs), 12)).astype(np.float32))
    adata = AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(12)]))
    spd.PerturbDiff.setup_anndata(adata, "perturbation", "control", context_keys=["cell_type"], batch_key="donor")
    return adata


def table_of(adata: AnnData) -> PopulationTable:
    return build_populations(spd.PerturbDiff(adata, **TINY).conditions, adata.obs)


@pytest.mark.parametrize("seed", range(3))
def test_no_perturbation_is_lost_to_validation(seed: int) -> None:
    """In one context a perturbation held out altogether could not be predicted: replicates are held out instead."""
    table = table_of(screen(contexts=1, donors=5))
    data = split_populations(table, 0.2, seed)
    assert len(data.validation) == 4
    assert set(table.component[data.training].ravel()) == set(table.component.ravel())
    alone = table_of(screen(contexts=1, donors=1))
    assert len(split_populations(alone, 0.3, seed).validation) == 0
    assert len(split_populations(alone, 0.3, seed, has_features=True).validation) == 1


def test_whole_conditions_are_held_out_where_the_perturbation_is_known_elsewhere() -> None:
    table = table_of(screen(contexts=3, donors=2))
    data = split_populations(table, 0.2, 0)
    held = table.labels.iloc[data.validation]
    keys = [c for c in held if c != "donor"]
    assert len(held) == 4 and (held.groupby(keys, observed=True).size() == 2).all()


@pytest.mark.parametrize("donors", [MANY_REPLICATES - 1, MANY_REPLICATES])
def test_many_replicates_are_shown_the_anchor_of_all_of_them(donors: int) -> None:
    """Leaving one of many out would tell the network which one it has to generate."""
    adata = screen(contexts=1, donors=donors)
    model = spd.PerturbDiff(adata, **TINY)
    table = build_populations(model.conditions, adata.obs)
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(adata.n_obs, 4))
    for i in range(len(table)):  # perturbations differ much, their replicates less
        effect = 3 * np.random.default_rng(int(table.component[i, 0])).normal(size=4)
        latent[table.cells[i]] += effect + rng.normal(size=4)
    latent = torch.as_tensor(latent, dtype=torch.float32)
    anchor = model.module.anchor
    fit_anchor(anchor, table, latent, None, 0)
    shown = rehearsed_anchors(anchor, table, None)[0]
    all_of_them, others = (anchor.leave_out(novelty, None) for novelty in ("seen", "replicate"))
    wanted = all_of_them if donors == MANY_REPLICATES else others
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(shown, wanted, strict=True))
    assert not np.allclose(all_of_them.mean, others.mean, atol=0.01)


def trained(adata: AnnData, plan: dict | None = None, **options: object) -> spd.PerturbDiff:
    torch.manual_seed(0)
    model = spd.PerturbDiff(adata, **TINY)
    model.train(**FEW_STEPS, plan_kwargs={**PLAN, **(plan or {})}, **options)
    return model


def test_compiled_training_is_the_same_training() -> None:
    """The backend that needs no compiler; what is saved has the usual names."""
    adata = screen(contexts=2, donors=2)
    plain, compiled = trained(adata), trained(adata, {"compile": "aot_eager"})
    ours, theirs = plain.module.generator_ema.state_dict(), compiled.module.generator_ema.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], atol=1e-4), name
    initial = spd.PerturbDiff(adata, **TINY).module.generator_ema.state_dict()
    assert any(not torch.equal(value, initial[name]) for name, value in ours.items())


def test_mixed_precision_trains_and_predicts() -> None:
    adata = screen(contexts=2, donors=2)
    full, mixed = trained(adata), trained(adata, precision="bf16-mixed")
    losses = [model.history_["generator_loss_train"].to_numpy(float).ravel() for model in (full, mixed)]
    assert np.isfinite(losses[1]).all() and not np.array_equal(*losses)
    assert np.abs(losses[1] / losses[0] - 1).max() < 0.3
    assert all(p.dtype == torch.float32 for p in mixed.module.parameters())
    predicted = mixed.predict(perturbations=["P0"], n_cells=6, progress=False)
    assert np.isfinite(predicted.obsm["X_perturbdiff"]).all()


def test_differences_are_negative_only_beyond_chance() -> None:
    noise = torch.tensor([1.0, -1.0] * 4)
    assert not is_negative(torch.zeros(8))
    assert not is_negative(noise - 0.5)  # by 1.3 standard errors: one in nine by chance
    assert is_negative(noise - 0.8)
    assert not is_negative(noise[:2] - 3)  # of two values, hardly anything is beyond chance
    assert not is_negative(noise + 0.5)
    assert is_negative(torch.tensor([-0.1])) and not is_negative(torch.tensor([0.1]))


class Judge(pl.Callback):
    """Replaces the scores of validation by ones that are given, so that the choice of weights can be looked at."""

    def __init__(self, gain: float) -> None:
        self.gain, self.noise = gain, torch.tensor([0.5, -0.5])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(pl_module, GeneratorTrainingPlan):
            n = pl_module.validation[0].n_populations
            noise = self.noise.repeat(n)[:n]

            def scores() -> tuple[torch.Tensor, torch.Tensor]:
                silent = pl_module.module.generator_ema.transformer.out.weight.abs().sum() == 0
                found = torch.zeros(n) if silent else noise - noise.mean() - self.gain
                return found, found[:, None]

            pl_module.validation_scores = scores


@pytest.mark.parametrize("donors", [1, 2])
@pytest.mark.parametrize("gain", [0.05, 5.0])
def test_a_network_no_better_than_the_anchor_is_silent(gain: float, donors: int) -> None:
    adata = screen(contexts=3, donors=donors)
    torch.manual_seed(0)
    model = spd.PerturbDiff(adata, **TINY)
    model.train(**FEW_STEPS, validation_size=0.4, plan_kwargs=PLAN, callbacks=[Judge(gain)])
    silent = not model.module.generator_ema.transformer.out.weight.any()
    assert silent == (gain < 1)


def test_jitter_moves_a_population_with_its_controls() -> None:
    """An untrained generator predicts controls moved by the anchor: moving both leaves its score where it was."""
    adata = screen(contexts=2, donors=2)
    losses = []
    for jitter in (0.0, 5.0):
        options = {**FEW_STEPS, "max_epochs_generator": 1}
        torch.manual_seed(0)
        model = spd.PerturbDiff(adata, **TINY)
        # one terminal step of an untrained network: noise drops out of its estimate
        plan = {**PLAN, "steps_per_epoch": 1, "p_terminal": 1.0, "n_populations": 64, "jitter": jitter}
        model.train(**options, plan_kwargs=plan)
        losses.append(float(model.history_["generator_loss_train"].iloc[0, 0]))
    assert losses[1] == pytest.approx(losses[0], rel=0.25)  # other populations are drawn


def test_what_is_judged() -> None:
    """Without replicates the distance of draws; with them the energy score of draws that are no further away."""
    silent = torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 5.0], [7.0, 9.0]])
    nearer = torch.tensor([0.5, 2.0]), torch.tensor([[1.0, 3.0], [7.0, 9.0]])
    further = torch.tensor([0.5, 2.0]), torch.tensor([[3.0, 5.0], [7.0, 13.0]])
    for replicated, wanted in ((True, [[-0.5, 0.0], None]), (False, [[-0.5, 0.0], [0.0, 0.25]])):
        judge = KeepBestGenerator(replicated)
        judge.silent_scores = silent
        found = [judge._gains(scores) for scores in (nearer, further)]
        assert [None if gains is None else gains.tolist() for gains in found] == wanted
