"""What training must not do: lose the model that was there, or leave numbers that are not finite."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tests.helpers import FEW_STEPS, assert_same_cells
from tests.screens import screen, tiny

from scperturbdiff.diffusion import GeneratorTrainingPlan
from scperturbdiff.latent import LatentTrainingPlan, LatentVAE
from scperturbdiff.training import PopulationTraining, all_or_nothing, finite_vae

if TYPE_CHECKING:
    from anndata import AnnData

    import scperturbdiff as spd

STAGES = (LatentTrainingPlan, GeneratorTrainingPlan)
KEPT = ("is_trained_", "report_", "populations_", "states_", "history_", "train_indices", "trainer")
PREDICT: dict[str, Any] = {"perturbations": ["P0", "P3"], "n_cells": 6, "seed": 1, "progress": False}


class Raise(pl.Callback):
    """Raises an error in the middle of a stage."""

    def __init__(self, stage: type, error: BaseException) -> None:
        self.stage, self.error = stage, error

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if isinstance(pl_module, self.stage):
            raise self.error


@pytest.fixture(scope="module")
def cells() -> AnnData:
    return screen(donors=1)


def trained(cells: AnnData, **options: Any) -> spd.PerturbDiff:
    model = tiny(cells)
    model.train(**(FEW_STEPS | {"seed": 0, "validation_size": 0.4, "logger": None} | options))
    return model


# ---- the model that was there before ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "error"), [*((stage, KeyboardInterrupt) for stage in STAGES), (GeneratorTrainingPlan, MemoryError)]
)
def test_a_trained_model_outlives_a_training_that_fails(
    cells: AnnData, stage: type, error: type[BaseException]
) -> None:
    model = trained(cells)
    before, kept = model.predict(**PREDICT), {name: getattr(model, name) for name in KEPT}
    retrieval, weights = model.module.retrieval, [p.clone() for p in model.module.parameters()]
    assert model.is_trained_ and retrieval is not None
    with pytest.raises(error):
        model.train(**FEW_STEPS, seed=5, batch_size=10, callbacks=[Raise(stage, error())])
    assert {name: getattr(model, name) for name in KEPT} == kept
    assert model.module.retrieval is retrieval
    assert all(map(torch.equal, weights, model.module.parameters()))
    assert_same_cells(before, model.predict(**PREDICT))


@pytest.mark.parametrize("stage", STAGES)
def test_a_model_that_was_never_trained_can_be_trained_after_an_interrupt(cells: AnnData, stage: type) -> None:
    model = tiny(cells)
    with pytest.raises(KeyboardInterrupt, match="interrupted; the model is as it was before"):
        model.train(**FEW_STEPS, callbacks=[Raise(stage, KeyboardInterrupt())])
    assert not model.is_trained_ and model.report_ is model.populations_ is model.module.retrieval is None
    with pytest.raises(RuntimeError, match="needs a trained model"):
        model.predict(**PREDICT)
    model.train(**(FEW_STEPS | {"seed": 0, "validation_size": 0.4, "logger": None}))
    assert_same_cells(trained(cells).predict(**PREDICT), model.predict(**PREDICT))


def test_an_interrupt_between_the_stages(cells: AnnData, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(cells)
    before = model.predict(**PREDICT)

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PopulationTraining, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.train(**FEW_STEPS, seed=5)
    assert_same_cells(before, model.predict(**PREDICT))


def test_a_process_that_is_told_to_end_does_not_end_well(cells: AnnData) -> None:
    model = tiny(cells)
    with pytest.raises(SystemExit) as ended, all_or_nothing(model):
        raise SIGTERMException
    assert ended.value.code == 143


def test_a_trained_model_can_be_pickled_and_copied_at_once(cells: AnnData) -> None:
    model = trained(cells)
    before = model.predict(**PREDICT)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert_same_cells(before, again.predict(**PREDICT))


# ---- finite numbers --------------------------------------------------------------------------------------------------


def all_finite(model: spd.PerturbDiff) -> bool:
    state = model.module.state_dict().values()
    return all(bool(value.isfinite().all()) for value in state if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("lr", [1.1, 1e3])
def test_a_vae_that_diverges_is_an_error(cells: AnnData, lr: float) -> None:
    """A rate of 1.1 leaves finite weights, and dispersions next to infinite."""
    model = trained(cells)
    before = model.predict(**PREDICT)
    with pytest.raises(ValueError, match=rf"VAE diverged: lower its lr.*now {lr}"):
        model.train(**(FEW_STEPS | {"max_epochs_vae": 30}), vae_plan_kwargs={"lr": lr})
    assert_same_cells(before, model.predict(**PREDICT))
    fresh = tiny(cells)
    with pytest.raises(ValueError, match="VAE diverged"):
        fresh.train(**(FEW_STEPS | {"max_epochs_vae": 30}), vae_plan_kwargs={"lr": lr})
    assert not fresh.is_trained_ and all_finite(fresh)


def test_a_loss_that_is_not_a_number_is_an_error(cells: AnnData, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = LatentVAE.loss

    def broken(*args: Any, **kwargs: Any) -> Any:
        out = loss(*args, **kwargs)
        out.loss = out.loss * float("nan")
        return out

    monkeypatch.setattr(LatentVAE, "loss", broken)
    model = tiny(cells)
    with pytest.raises(ValueError, match="VAE diverged"):
        model.train(**FEW_STEPS)
    assert not model.is_trained_ and all_finite(model)


def test_weights_that_are_finite_and_too_large_are_divergence(cells: AnnData) -> None:
    vae, bad = tiny(cells).module.vae, torch.tensor([float("nan")])
    with pytest.raises(ValueError, match="VAE diverged"), finite_vae(vae, 1e4):
        # torch.compile, once used in the process, turns the check off by default
        torch.distributions.Normal(bad, torch.ones(1), validate_args=True)


def test_an_untrained_vae_that_is_kept_is_warned_about(cells: AnnData, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny(cells)
    for times in (1, 1):  # told once: the model is trained then
        with caplog.at_level("WARNING", logger="scvi.scperturbdiff"):
            model.train(**(FEW_STEPS | {"max_epochs_vae": 0}))
        assert caplog.text.count("The VAE is not trained (max_epochs_vae=0)") == times


def test_other_errors_of_the_first_stage_stay_what_they_are(cells: AnnData) -> None:
    with pytest.raises(ValueError, match="something else"), finite_vae(tiny(cells).module.vae, 1e-3):
        raise ValueError("something else")


@pytest.mark.parametrize(("validation_size", "lr"), [(0.0, 10), (0.0, 1e30), (0.4, 10), (0.4, 1e30)])
def test_a_network_that_diverges_is_not_used_and_leaves_nothing(
    cells: AnnData, validation_size: float, lr: float
) -> None:
    plan = {**FEW_STEPS["plan_kwargs"], "lr": lr, "steps_per_epoch": 60}
    model = trained(cells, validation_size=validation_size, plan_kwargs=plan, max_epochs_generator=2)
    assert all_finite(model)
    assert model.report_.network_weight == model.module.generator_ema.network_weight == 0
    assert "lower lr" in str(model.report_) and (validation_size or "diverged" in str(model.report_))
    assert np.isfinite(model.predict(**PREDICT).obsm["X_perturbdiff"]).all()
    # the weights that training started from: the last layer of a new network is 0
    assert not model.module.generator_ema.transformer.out.weight.any()
    before = model.predict(**PREDICT)
    model.train(**FEW_STEPS | {"max_epochs_vae": 0, "max_epochs_generator": 0})
    assert_same_cells(before, model.predict(**PREDICT))


@pytest.mark.parametrize("validation_size", [0.0, 0.4])
def test_what_diverges_in_further_training_leaves_the_weights_of_before(cells: AnnData, validation_size: float) -> None:
    model = trained(cells, validation_size=0.0)
    before = {name: value.clone() for name, value in model.module.generator_ema.named_parameters()}
    assert before["transformer.out.weight"].any()
    plan = {**FEW_STEPS["plan_kwargs"], "lr": 1e30, "steps_per_epoch": 6}
    model.train(**(FEW_STEPS | {"plan_kwargs": plan, "max_epochs_vae": 0}), validation_size=validation_size)
    assert all_finite(model)
    if validation_size and model.report_.network_weight:
        assert "Later its training diverged" in model.report_.network_reason
    assert all(torch.equal(before[name], value) for name, value in model.module.generator_ema.named_parameters())


def test_nothing_that_is_not_finite_is_left(cells: AnnData, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = PopulationTraining.finish

    def broken(self: PopulationTraining, stage: Any) -> Any:
        self.module.latent_scale[0] = float("inf")
        return finish(self, stage)

    monkeypatch.setattr(PopulationTraining, "finish", broken)
    model = tiny(cells)
    with pytest.raises(ValueError, match="latent_scale not finite"):
        model.train(**FEW_STEPS)
    assert not model.is_trained_ and all_finite(model)


# ---- something to train on -------------------------------------------------------------------------------------------


def test_without_populations_to_train_on_the_vae_is_not_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    def trains(*args: Any) -> None:
        pytest.fail("the first stage ran")

    monkeypatch.setattr("scperturbdiff.model.latent_stage", trains)
    for size, text in ((0.99, "All 4 conditions would be held out"), (1.5, "validation_size=1.5")):
        with pytest.raises(ValueError, match=text):
            tiny(screen(contexts=1, donors=1, features=True)).train(**FEW_STEPS, validation_size=size)
