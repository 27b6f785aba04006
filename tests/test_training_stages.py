"""The two stages: options of the first, held-out populations of the second, what is known after it, its report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from tests.helpers import FEW_STEPS
from tests.screens import replicated_latent, screen, table_of, tiny, use_latent

import scperturbdiff as spd
from scperturbdiff.diffusion import SELECTION_METRIC, GeneratorTrainingPlan, NetworkSelection, Prior
from scperturbdiff.latent import LatentVAE
from scperturbdiff.responses import replicate_factors
from scperturbdiff.retrieval import Retrieval, RetrievalSettings
from scperturbdiff.training import PopulationTraining, Stage, latent_stage
from scperturbdiff.training._populations import population_tensors
from scperturbdiff.training_report import TrainingReport

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

PLAN = {"steps_per_epoch": 2, "n_populations": 4, "n_cells": 8}
SHORT = {"max_epochs_vae": 1, "enable_progress_bar": False, "accelerator": "cpu", "seed": 0, "plan_kwargs": PLAN}


@pytest.fixture(scope="module")
def cells() -> AnnData:
    return screen()


# ---- the first stage -------------------------------------------------------------------------------------------------


class KlWeights(pl.Callback):
    """Weight of the KL term at every step, and learning rates after every epoch."""

    def __init__(self) -> None:
        self.found: list[float] = []
        self.rates: list[list[float]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        self.found.append(float(pl_module.kl_weight))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def first_stage(adata: AnnData, epochs: int = 4, train_size: float = 1.0, **plan: Any) -> tuple[KlWeights, list[float]]:
    """Train the VAE on 100 cells, 4 batches an epoch; weights that were asked for, and those its loss was given."""
    used: list[float] = []
    model, listener = tiny(adata), KlWeights()
    loss = LatentVAE.loss

    def listen(
        self: LatentVAE, tensors: Any, inference_outputs: Any, generative_outputs: Any, kl_weight: Any = 1.0
    ) -> Any:
        if self.training:
            used.append(float(kl_weight))
        return loss(self, tensors, inference_outputs, generative_outputs, kl_weight=kl_weight)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatentVAE, "loss", listen)
        model.train(
            max_epochs_vae=epochs,
            max_epochs_generator=0,
            batch_size=25,
            train_size=train_size,
            vae_plan_kwargs=plan,
            callbacks=[listener],
            enable_progress_bar=False,
            accelerator="cpu",
        )
    return listener, used


@pytest.mark.parametrize(
    ("plan", "wanted"),
    [
        ({}, np.repeat([0.0, 0.025, 0.05, 0.05], 4)),  # half of the epochs
        ({"n_epochs_kl_warmup": 4}, np.repeat([0.0, 0.0125, 0.025, 0.0375], 4)),
        ({"n_epochs_kl_warmup": 0}, np.full(16, 0.05)),
        ({"n_epochs_kl_warmup": None}, np.full(16, 0.05)),
        ({"n_steps_kl_warmup": 10}, 0.05 * np.minimum(np.arange(16) / 10, 1)),
        ({"n_steps_kl_warmup": 8, "max_kl_weight": 1.0}, np.minimum(np.arange(16) / 8, 1)),
    ],
)
def test_weight_of_the_kl_term(cells: AnnData, plan: dict[str, Any], wanted: np.ndarray) -> None:
    assert cells.n_obs == 100
    listener, used = first_stage(cells, **plan)
    np.testing.assert_allclose(listener.found, wanted, atol=1e-7)
    np.testing.assert_allclose(used, wanted, atol=1e-7)


def stage_of(adata: AnnData, **plan: Any) -> Stage:
    model = tiny(adata)
    return latent_stage(model.module, model.adata_manager, 4, 25, 1.0, {}, **plan)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("compiled", [False, True])
def test_optimizer_and_rate_of_the_dispersions(cells: AnnData, name: str, compiled: bool) -> None:
    """Also where a compiled module puts a prefix before the names."""
    compile = {"compile": True, "compile_kwargs": {"backend": "eager"}} if compiled else {}
    plan: Any = stage_of(cells, optimizer=name, lr=1e-2, dispersion_lr_factor=3.0, weight_decay=0.1, **compile).plan
    names = [n for n, _ in plan.module.named_parameters() if n.endswith("px_r")]
    assert names == [f"{'_orig_mod.' if compiled else ''}px_r"]
    optimizer = plan.configure_optimizers()["optimizer"]
    assert type(optimizer) is getattr(torch.optim, name)
    weights, dispersions = optimizer.param_groups
    assert [tuple(p.shape) for p in dispersions["params"]] == [(cells.n_vars,)]
    assert dispersions["params"][0] is dict(plan.module.named_parameters())[names[0]]
    assert dispersions["lr"] == pytest.approx(3e-2) and dispersions["weight_decay"] == 0
    assert weights["lr"] == 1e-2 and weights["weight_decay"] == 0.1
    trained = [p for p in plan.module.parameters() if p.requires_grad]
    assert len(weights["params"]) == len(trained) - 1
    assert "lr_scheduler" not in plan.configure_optimizers()


def test_the_rate_falls_on_a_plateau_where_asked_for(cells: AnnData) -> None:
    plateau = {"lr_patience": 0, "lr_threshold": 1e9, "lr_factor": 0.5, "lr_min": 0.0}
    rates = first_stage(cells, train_size=0.75, reduce_lr_on_plateau=True, **plateau)[0].rates
    assert len(rates[0]) == 2
    falls = np.array(rates)[:, 0]
    assert (np.diff(falls) <= 0).all() and falls[-1] <= 0.25 * falls[0]
    assert np.ptp(np.array(first_stage(cells, train_size=0.75)[0].rates)[:, 0]) == 0


def test_an_unknown_optimizer_is_an_error(cells: AnnData) -> None:
    with pytest.raises(ValueError, match="Optimizer not understood"):
        first_stage(cells, optimizer="SGD")


def test_cells_are_encoded_without_their_batch(cells: AnnData) -> None:
    with pytest.raises(ValueError, match="encode_covariates=True is not possible"):
        spd.PerturbDiff(cells, n_latent=4, vae_kwargs={"encode_covariates": True})
    spd.PerturbDiff(cells, n_latent=4, vae_kwargs={"encode_covariates": False})


@pytest.mark.parametrize("option", [{"use_observed_lib_size": False}, {"use_size_factor_key": True}])
def test_library_sizes_are_those_of_cells(cells: AnnData, option: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match="with library sizes of the control cells"):
        spd.PerturbDiff(cells, n_latent=4, vae_kwargs=option)


@pytest.mark.parametrize(
    ("plan", "said"), [({"objective": "mmse"}, "objective='mmse' is not one of"), ({"n_draws": 1}, "at least 2")]
)
def test_a_wrong_objective_is_named_before_anything_is_trained(
    cells: AnnData, plan: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spd.PerturbDiff, "_run", lambda *_: pytest.fail("trained"))
    with pytest.raises(ValueError, match=said):
        spd.PerturbDiff(cells, n_latent=4).train(plan_kwargs=plan)


# ---- the second stage ------------------------------------------------------------------------------------------------


class Judge(pl.Callback):
    """Replaces the distances of validation by ones given for each epoch, and keeps the averaged weights of each.

    Distances without the network are 1 and 3 in turn over held-out conditions, times 1 and 3 in turn those given.
    """

    def __init__(self, distances: Any) -> None:
        self.distances = distances
        self.weights: list[dict[str, torch.Tensor]] = []
        self.changes: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not isinstance(pl_module, GeneratorTrainingPlan):
            return
        assert pl_module.validation is not None and pl_module.selection is not None
        n = pl_module.validation[0].n_populations
        of = np.unique(pl_module.selection.condition[pl_module.scored.numpy()], return_inverse=True)[1] % 2

        def scores(strength: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
            weight = float(pl_module.module.generator_ema.network_weight)
            found = torch.tensor([1.0, 3.0])
            if strength is not None:
                found = self.law * found
            elif weight < 1:  # in part the network does harm
                found = (1 + 9 * weight) * found
            else:
                found = torch.tensor(self.distances(trainer.current_epoch), dtype=torch.float32)
            return torch.ones(n), found[torch.as_tensor(of)][:, None].expand(-1, 4)

        pl_module.validation_scores = scores

    law = 1.0
    """What a law of responses makes of distances."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if isinstance(pl_module, GeneratorTrainingPlan) and not trainer.sanity_checking:
            state = pl_module.module.generator_ema.state_dict()
            self.weights.append({name: value.clone() for name, value in state.items()})
            assert pl_module.selection is not None and pl_module.last_distances is not None
            self.changes.append(float(pl_module.selection.change(pl_module.last_distances).mean()))


def judged(judge: Judge, donors: int = 2, law: float = 0.0, **options: Any) -> spd.PerturbDiff:
    """A training with given distances, and a law of responses that changes them by a share; six conditions held out."""
    found = {way: np.linspace(0, 2, 64) for way in ("seen", "replicate", "pair", "context") if law}
    judge.law = 1 + law
    model = tiny(screen(contexts=3, donors=donors))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scperturbdiff.training._stages.responsiveness_laws", lambda *_: found)
        model.train(**SHORT, validation_size=0.5, callbacks=[judge], **options)
    return model


def same_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    names = [name for name in ours if name not in ("network_weight", "replicate_factors")]
    return all(torch.equal(ours[name], theirs[name]) for name in names)


def test_the_number_that_stops_training_is_the_one_that_chooses_weights() -> None:
    """The mean distance falls on and on, by the most distant populations; on average they were best after one epoch."""
    judge = Judge(lambda epoch: [0.5 + 0.1 * epoch, 1.5 - 0.12 * epoch])
    model = judged(judge, max_epochs_generator=30)
    history = model.history_
    assert (np.diff(history["energy_distance_validation"].to_numpy(float).ravel()) < 0).all()
    logged = history[SELECTION_METRIC].to_numpy(float).ravel()
    np.testing.assert_allclose(logged, judge.changes, rtol=1e-5)
    assert logged.argmin() == 0 and len(logged) == 1 + 10  # patience
    assert same_weights(model.module.generator_ema.state_dict(), judge.weights[0])
    assert not same_weights(judge.weights[0], judge.weights[-1])
    assert model.report_.network["change"] == pytest.approx(logged.min(), rel=1e-5)
    assert model.module.generator_ema.network_weight == model.report_.network_weight == 1


def test_training_that_improves_is_not_stopped() -> None:
    judge = Judge(lambda epoch: [0.9**epoch, 3 * 0.9**epoch])
    model = judged(judge, max_epochs_generator=14)
    assert len(judge.weights) == 14
    assert same_weights(model.module.generator_ema.state_dict(), judge.weights[-1])


def test_early_stopping_can_be_turned_off() -> None:
    judge = Judge(lambda epoch: [0.5 + 0.1 * epoch, 1.5])
    model = judged(judge, max_epochs_generator=14, early_stopping=False)
    assert len(judge.weights) == 14  # and the best are kept all the same
    assert same_weights(model.module.generator_ema.state_dict(), judge.weights[0])


@pytest.mark.parametrize("donors", [1, 2])
@pytest.mark.parametrize(("law", "used"), [(0.0, True), (-0.2, True), (-0.27, False), (-0.4, False)])
def test_a_network_must_be_clearly_better_than_a_law_of_responses(law: float, used: bool, donors: int) -> None:
    model = judged(Judge(lambda _: [0.7, 2.1]), donors=donors, law=law, max_epochs_generator=1)
    report, retrieval = model.report_, model.module.retrieval
    assert report is not None and retrieval is not None
    assert report.network_weight == model.module.generator_ema.network_weight == float(used)
    assert bool(retrieval.responsiveness) == bool(report.hardly_respond) == (not used)
    assert ("a law of how strongly cells respond" in report.network_reason) == (not used)


@pytest.mark.parametrize("donors", [1, 2])
@pytest.mark.parametrize(("change", "used"), [(-0.06, True), (-0.04, False)])
def test_a_network_that_does_not_help_is_not_used(change: float, used: bool, donors: int) -> None:
    model = judged(Judge(lambda _: [1 + change, 3 * (1 + change)]), donors=donors, max_epochs_generator=2)
    generator, report = model.module.generator_ema, model.report_
    assert generator.network_weight == report.network_weight == float(used)
    assert report.network["n_held_out"] == 6 and sum(report.held_out.values()) == 6 * donors
    assert bool(generator.transformer.out.weight.any()) == used  # else the weights are those training started from
    assert f"{change:+.1%}" in report.network_reason and report.network_reason in str(report)


def test_held_out_populations_are_scored_as_strongly_as_their_cells_respond() -> None:
    """As strongly as is retrieved: as without a law; not at all: as their controls."""
    training = prepared(screen(contexts=5, donors=2), validation_size=0.5)
    plan = training.stage(1, True, {}).plan
    plan.module.generator_ema.network_weight.zero_()
    asked = list[tuple[int, int]]()

    def strength(number: int, n: int) -> np.ndarray:
        asked.append((number, n))
        return np.ones(n)

    alike, close = plan.validation_scores(), {"rtol": 2e-3, "atol": 1e-3}  # distances of single precision
    for found, wanted in zip(plan.validation_scores(strength), alike, strict=True):
        torch.testing.assert_close(found, wanted, **close)
    assert [number for number, _ in asked] == plan.scored.tolist() and len(set(asked)) == len(training.held_out)
    still = plan.validation_scores(lambda _, n: np.zeros(n))[1]
    assert (still - alike[1]).abs().max() > 0.05
    none = Prior.none(len(training.held_out), training.latent.shape[1], torch.device("cpu"))
    tensors = population_tensors(training.measured.take(training.held_out), [none], torch.device("cpu"))
    plan.validation = plan.validation[0], tensors
    torch.testing.assert_close(still, plan.validation_scores()[1], **close)


def test_training_that_breaks_leaves_a_model_that_predicts() -> None:
    model = judged(Judge(lambda _: [float("nan"), 1.0]), max_epochs_generator=2)
    assert model.report_.network_weight == 0 and "no finite weights" in model.report_.network_reason
    assert all(value.isfinite().all() for value in model.module.generator_ema.state_dict().values())
    assert np.isfinite(model.predict(perturbations=["P0"], n_cells=4, progress=False).obsm["X_perturbdiff"]).all()


def prepared(adata: AnnData, validation_size: float | None = 0.25, **options: Any) -> PopulationTraining:
    model = tiny(adata)
    features = model.conditions.feature_matrix()
    table = table_of(adata)
    return PopulationTraining.prepare(model.module, model.adata_manager, table, features, validation_size, 0, **options)


def test_after_training_everything_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retrieval and the law of replicates are fitted again with the populations that judged the network."""
    adata = screen(contexts=2, donors=6)
    table = table_of(adata)
    held_out = prepared(adata).held_out
    assert len(held_out) == 12
    # what is held out varies most, so that it must show
    strength = {i: 6.0 if i in set(held_out) else 2.0 for i in range(len(table))}
    use_latent(monkeypatch, replicated_latent(table, adata.n_obs, strength))
    training = prepared(adata)
    np.testing.assert_array_equal(training.held_out, held_out)
    stage, module = training.stage(1, True, {}), training.module
    generators = module.generator, module.generator_ema

    def law() -> list[np.ndarray]:
        return [g.replicate_factors.numpy() @ g.replicate_factors.numpy().T for g in generators]

    some, every = (replicate_factors(of, 16) for of in (training.measured.take(training.training), training.measured))
    assert some.shape[1] and np.linalg.norm(every) > 1.2 * np.linalg.norm(some)
    for found in law():
        np.testing.assert_allclose(found, some @ some.T, rtol=1e-4, atol=1e-4)
    assert module.retrieval is not None and len(module.retrieval.responses) == len(training.training)
    report = training.finish(stage)
    for found in law():
        np.testing.assert_allclose(found, every @ every.T, rtol=1e-4, atol=1e-4)
    again = Retrieval.fit(training.measured.responses, None, RetrievalSettings(), 0)
    known = training.measured.responses.conditions
    np.testing.assert_array_equal(module.retrieval.predict(known).shift, again.predict(known).shift)
    assert report.replicate_directions == every.shape[1] and report.n_replicated == 8
    assert report.retrieval == pytest.approx({str(k): v for k, v in again.explained.items()}, nan_ok=True)
    assert report.n_populations == len(table) and sum(report.held_out.values()) == 12


def test_objectives_without_variation_have_no_law_of_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when a model is trained further with another objective, and after held-out populations are known."""
    adata = screen(contexts=2, donors=6)
    table = table_of(adata)
    use_latent(monkeypatch, replicated_latent(table, adata.n_obs, dict.fromkeys(range(len(table)), 3.0)))
    training = prepared(adata)
    generators = training.module.generator, training.module.generator_ema
    training.finish(training.stage(1, True, {}))
    assert all(g.replicate_factors.any() for g in generators)
    stage = training.stage(1, True, {}, objective="mmd")
    assert not any(g.replicate_factors.any() for g in generators)
    assert training.finish(stage).replicate_directions == 0
    assert not any(g.replicate_factors.any() for g in generators)


def test_latent_dimensions_are_standardised_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    adata = screen()
    latent = 5 * torch.randn(adata.n_obs, 4) + 3
    use_latent(monkeypatch, latent)
    training = prepared(adata)
    torch.testing.assert_close(training.latent, (latent - latent.mean(0)) / latent.std(0))
    np.testing.assert_array_equal(training.measured.latent, training.latent.numpy())


@pytest.mark.parametrize("validation_size", [0.0, 0.25])
def test_only_whole_trainings_of_the_second_stage_are_finished(cells: AnnData, validation_size: float) -> None:
    training = prepared(cells, validation_size)
    stage = training.stage(1, True, {"callbacks": [pl.Callback()]})
    assert stage.options["early_stopping"] == bool(validation_size)
    assert [type(c).__name__ for c in stage.options["callbacks"]] == [
        "Callback",
        "StageName",
        "RepeatableEpochs",
        "NetworkSelection",
    ]
    assert isinstance(stage.selection, NetworkSelection) and stage.selection is stage.plan.selection
    assert training.populations()["held_out"].sum() == len(training.held_out)
    with pytest.raises(TypeError, match="second stage"):
        training.finish(stage_of(cells))


# ---- the report ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reported(cells: AnnData) -> spd.PerturbDiff:
    model = tiny(cells)
    model.train(**FEW_STEPS, seed=0, validation_size=0.4)
    return model


def test_the_report_says_what_was_there(reported: spd.PerturbDiff) -> None:
    report = reported.report_
    assert isinstance(report, TrainingReport)
    assert (report.n_populations, report.n_conditions, report.n_contexts, report.n_replicated) == (16, 8, 2, 8)
    assert set(report.retrieval) == {"replicate", "pair", "context", "perturbation"}
    assert all(not share > 1 for share in report.retrieval.values())  # of noise, less than nothing is explained
    assert sum(report.held_out.values()) == 6 == reported.populations["held_out"].sum()
    assert set(report.held_out) <= {"seen", "pair", "context", "perturbation"}
    assert report.network_weight == reported.module.generator_ema.network_weight
    assert report.network["n_held_out"] == 3 and np.isfinite(report.network["change"])
    assert report.network["without_network"] == pytest.approx(report.network["with_network"], rel=0.5)
    assert len(report.little_evidence) == 16  # of five cells each
    assert report.replicate_directions == reported.module.generator_ema.replicate_factors.any(0).sum()
    assert report.notes == reported.module.retrieval.notes


def test_the_report_is_two_lines_and_a_table(reported: spd.PerturbDiff) -> None:
    report = reported.report_
    first, second = str(report).split("\n")
    n_states = 1 if reported.module.by_state is None else len(reported.module.by_state.states)
    assert report.n_states == n_states == 1
    assert first.startswith("Retrieval from 16 populations of 8 conditions in 2 contexts, 1 state of cells: explains ")
    assert second == f"Network weight {report.network_weight:g}. {report.network_reason}"
    assert str(report) in reported.summary_string
    table = report.to_frame()
    assert list(table.columns) == ["part", "what", "value"]
    assert all(isinstance(value, str) for value in table["value"])
    assert set(table["part"]) == {"data", "retrieval", "held out", "network", "little evidence", "notes", "settings"}
    settings = table[table["part"] == "settings"].set_index("what")["value"]
    assert set(report.settings) == {"training", "responses", "retrieval", "diffusion"}
    for room, values in report.settings.items():
        assert values
        for name in values:
            assert f"{room}.{name}" in settings.index
    assert settings["diffusion.n_cells"] == "8" and settings["retrieval.n_neighbors"] == "192"
    assert settings["diffusion.n_populations"] == "4" and settings["diffusion.objective"] == "energy_score"
    assert (table[table["part"] == "little evidence"]["value"].str.contains("C0")).sum() == 8


def test_shares_that_round_to_nothing_have_no_sign() -> None:
    text = str(TrainingReport(retrieval={"pair": -0.001, "context": 0.996, "perturbation": float("nan")}))
    assert "explains 0% of a new pair, 100% of a new context when left out" in text


def test_settings_in_the_report_are_those_that_were_used(cells: AnnData) -> None:
    torch.manual_seed(0)
    model = spd.PerturbDiff(cells, n_latent=4, width=8, n_heads=1, retrieval_kwargs={"n_neighbors": 7})
    model.train(**(FEW_STEPS | {"plan_kwargs": {**PLAN, "lr": 0.5, "objective": "mmd"}}))
    settings = model.report_.settings
    assert settings["retrieval"]["n_neighbors"] == 7 and settings["diffusion"]["lr"] == 0.5
    assert settings["diffusion"]["objective"] == "mmd" and settings["training"]["min_held_out"] == 5


def test_the_report_is_saved_with_the_model(reported: spd.PerturbDiff, tmp_path: Path) -> None:
    reported.save(tmp_path / "m")
    again = spd.PerturbDiff.load(tmp_path / "m", adata=False)
    assert str(again.report_) == str(reported.report_)
    assert again.report_.to_frame().equals(reported.report_.to_frame())
    assert again.report_.network_weight == again.module.generator_ema.network_weight


def test_a_network_that_nothing_was_held_out_for_is_untested(cells: AnnData) -> None:
    model = tiny(cells)
    assert model.report_ is None and "Network weight" not in model.summary_string
    model.train(**FEW_STEPS, validation_size=0.0)
    report = model.report_
    assert report.held_out == {} and "untested" in report.network_reason and "untested" in str(report)
    assert report.network_weight == model.module.generator_ema.network_weight == 1
    assert report.network["n_held_out"] == 0 and np.isnan(report.network["change"])


@pytest.mark.parametrize(("perturbations", "trained"), [(4, False), (5, True)])
def test_a_network_is_trained_where_populations_can_tell_if_it_helps(perturbations: int, trained: bool) -> None:
    """A third of 12 populations are four that could be held out, of 15 five."""
    model = tiny(screen(contexts=3, donors=1, perturbations=perturbations))
    brief = {name: value for name, value in FEW_STEPS.items() if name not in ("max_epochs_generator", "logger")}
    model.train(**brief, max_epochs=2)
    assert ("generator_loss_train" in model.history_) == trained
    assert model.report_.network["n_held_out"] == sum(model.report_.held_out.values()) == (5 if trained else 0)
    assert model.module.retrieval is not None and not model.populations["held_out"].all()
    if not trained:
        assert model.report_.network_weight == model.module.generator_ema.network_weight == 0
        assert "Less than 5 conditions could be held out" in str(model.report_)
        assert np.isfinite(model.predict(perturbations=["P0"], progress=False).obsm["X_perturbdiff"]).all()


def test_where_nothing_can_be_left_out_the_report_says_so() -> None:
    model = tiny(screen(contexts=1, donors=1, perturbations=1))
    model.train(**FEW_STEPS)
    assert "nothing could be left out" in str(model.report_) and "explains" not in str(model.report_)
    assert np.isnan(list(model.report_.retrieval.values())).all()


def test_pretraining_has_a_report(cells: AnnData) -> None:
    controls = cells[(cells.obs["perturbation"] == "control").to_numpy()].copy()
    spd.PerturbDiff.setup_anndata(controls, context_keys=["cell_type"])
    model = tiny(controls)
    model.train(**FEW_STEPS)
    assert model.report_.n_populations == 0 and model.report_.retrieval == {} and model.module.retrieval is None
    assert "untested" in str(model.report_) and len(model.report_.to_frame()) > 10
