"""The two stages of training, each built from the module and the cells; the model runs them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from scperturbdiff.data import PopulationTable, iter_rows
from scperturbdiff.diffusion import (
    SELECTION_METRIC,
    GeneratorTrainingPlan,
    NetworkSelection,
    PopulationSampler,
    PopulationTensors,
    RepeatableEpochs,
    StepsDataModule,
    split_callbacks,
)
from scperturbdiff.latent import CellDataModule, LatentTrainingPlan
from scperturbdiff.priors import make_prior
from scperturbdiff.report import FEW_CELLS, TrainingReport
from scperturbdiff.responses import (
    MeasuredPopulations,
    ResponseSettings,
    measure_populations,
    replicate_factors,
    response_of_states,
)
from scperturbdiff.retrieval import Retrieval
from scperturbdiff.training._folds import fold_evidence
from scperturbdiff.training._populations import (
    count_replicates,
    population_tensors,
    rehearsed_priors,
    split_populations,
)
from scperturbdiff.training._settings import SETTINGS
from scperturbdiff.training._states import StateSearch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import lightning.pytorch as pl
    import pandas as pd
    from numpy.typing import NDArray
    from scvi.data import AnnDataManager

    from scperturbdiff.module import PerturbDiffModule
    from scperturbdiff.retrieval import Novelty, States


@dataclass(frozen=True)
class Stage:
    """One stage of training, ready for scvi-tools' trainer.

    Attributes
    ----------
    plan, data
        What is trained, and on what.
    max_epochs
        Epochs at most.
    options
        Arguments of the trainer.
    checkpoints
        Lightning's own checkpoints, which scvi-tools' trainer does not take as arguments.
    selection
        What decides whether the network is used, in the second stage.
    novelty
        In which way each held-out population is new.
    """

    plan: pl.LightningModule
    data: pl.LightningDataModule
    max_epochs: int
    options: dict[str, Any] = field(default_factory=dict)
    checkpoints: Sequence[pl.Callback] = ()
    selection: NetworkSelection | None = None
    novelty: Sequence[Novelty] = ()


def default_vae_epochs(n_cells: int, batch_size: int) -> int:
    """Epochs that make a sensible number of steps for this many cells."""
    per_epoch = max(1, n_cells // batch_size)
    steps = min(max(SETTINGS.latent_passes * per_epoch, SETTINGS.latent_min_steps), SETTINGS.latent_max_steps)
    return max(1, round(steps / per_epoch))


def plan_epochs(
    n_cells: int,
    batch_size: int,
    max_epochs: int | None,
    vae: int | None,
    generator: int | None,
    *,
    trained: bool,
    adapted: bool = False,
) -> tuple[int, int]:
    """Epochs of both stages from what the user gave.

    Unless asked for, a trained model's VAE is kept, and one adapted from a reference is trained shortly.
    """
    for name, value in (("max_epochs", max_epochs), ("max_epochs_vae", vae), ("max_epochs_generator", generator)):
        if value is not None and (int(value) != value or value < 0):
            raise ValueError(f"{name}={value!r} must be a whole number, 0 or more.")
    if vae is None:
        vae = 0 if trained else default_vae_epochs(n_cells, batch_size)
        vae = math.ceil(vae / 5) if adapted else vae
    if generator is None:
        generator = SETTINGS.network_epochs
    bound = math.inf if max_epochs is None else max_epochs
    return int(min(vae, bound)), int(min(generator, bound))


def latent_stage(
    module: PerturbDiffModule,
    manager: AnnDataManager,
    max_epochs: int,
    batch_size: int,
    train_size: float,
    trainer: dict[str, Any],
    max_kl_weight: float = 0.05,
    **plan_kwargs: Any,
) -> Stage:
    """Stage 1: train the VAE on all cells; by default the weight of its KL term rises over half of the epochs."""
    module.vae.train()
    if plan_kwargs.get("n_steps_kl_warmup") is not None:  # scvi-tools would prefer its default of 400 epochs
        plan_kwargs.setdefault("n_epochs_kl_warmup", None)
    plan_kwargs.setdefault("n_epochs_kl_warmup", max(1, max_epochs // 2))
    plan = LatentTrainingPlan(module.vae, max_kl_weight=max_kl_weight, **plan_kwargs)
    callbacks = split_callbacks(trainer.get("callbacks"))[1]
    options = {**trainer, "early_stopping": False, "callbacks": callbacks}
    return Stage(plan, CellDataModule(manager, train_size, batch_size), max_epochs, options)


def encode_cells(module: PerturbDiffModule, matrix: Any, chunk: int = 4096) -> torch.Tensor:
    """Latent vectors `(n_cells, n_latent)` of counts `(n_cells, n_genes)`, on the module's device."""
    module.eval()
    return module.encode(iter_rows(matrix, chunk=chunk))


@dataclass(frozen=True)
class PopulationTraining:
    """What the second stage is trained on.

    Attributes
    ----------
    module
        Its latent scale is that of the cells.
    measured
        All populations.
    training, held_out
        Rows of those to train on, and of those that decide when to stop and whether the network is used.
    latent
        Standardised latent vectors of all cells, `(n_cells, n_latent)`.
    matrix
        Counts of all cells, `(n_cells, n_genes)`.
    features
        Feature table of components.
    seed
        Of all choices.
    enough
        Whether there are populations enough to tell if a network helps, or the user wants it untested.
    """

    module: PerturbDiffModule
    measured: MeasuredPopulations
    training: NDArray[np.int64]
    held_out: NDArray[np.int64]
    latent: torch.Tensor
    matrix: Any
    features: NDArray[np.float64] | None
    seed: int
    enough: bool = True

    @classmethod
    def prepare(
        cls,
        module: PerturbDiffModule,
        manager: AnnDataManager,
        table: PopulationTable,
        features: NDArray[np.float64] | None,
        validation_size: float | None,
        seed: int,
    ) -> PopulationTraining:
        """Fix the latent space, measure the populations in it, hold some of them out."""
        matrix, batch = (manager.get_from_registry(name) for name in ("X", "batch"))
        latent = encode_cells(module, matrix)
        module.set_latent_scale(latent)
        latent = module.standardize(latent)
        training, held_out = split_populations(table, validation_size, seed, has_features=features is not None)
        enough = validation_size is not None or len(table) == 0 or len(held_out) >= SETTINGS.min_held_out
        if not enough:
            training, held_out = np.arange(len(table)), np.empty(0, np.int64)
        measured = measure_populations(table, latent, matrix, batch.ravel(), module.shares)
        return cls(module, measured, training, held_out, latent, matrix, features, seed, enough)

    def stage(
        self,
        max_epochs: int,
        early_stopping: bool,
        trainer: dict[str, Any],
        asked: bool = False,
        steps_per_epoch: int = SETTINGS.steps_per_epoch,
        gradient_clip_val: float = 1.0,
        ckpt_path: str | Path | None = None,
        **plan_kwargs: Any,
    ) -> Stage:
        """Stage 2: retrieve responses, train the generator on populations.

        Of no epochs where there are too few populations to tell whether the network helps, unless they are `asked` for.
        """
        max_epochs = max_epochs if self.enough or asked else 0
        module, training = self.module, self.measured.take(self.training)
        self._retrieve(training)
        self._set_replicates(training, self._n_factors(plan_kwargs.get("objective", "energy_score")))
        sampler, tensors = self._training_set(training, rehearse=max_epochs > 0)
        validation, novelty = self._validation_set() if len(self.held_out) else (None, [])
        table = self.measured.table
        replicated = len(table) == 0 or bool((count_replicates(table) > 1).any())
        selection = NetworkSelection(replicated, min_held_out=SETTINGS.min_held_out, untested=self.enough)
        steps = max_epochs * steps_per_epoch
        plan = GeneratorTrainingPlan(
            module, self.latent, sampler, tensors, validation, selection, n_steps=steps, seed=self.seed, **plan_kwargs
        )
        for generator in (module.generator, module.generator_ema):
            generator.network_weight.fill_(1)
        module.generator.train()
        checkpoints, others = split_callbacks(trainer.get("callbacks"))
        options: dict[str, Any] = {
            "early_stopping": early_stopping and validation is not None,
            "early_stopping_monitor": SELECTION_METRIC,
            "early_stopping_patience": 10,
            "gradient_clip_val": gradient_clip_val,
            "check_val_every_n_epoch": 1,
            "ckpt_path": ckpt_path,
            **trainer,
            "callbacks": [*others, RepeatableEpochs(self.seed), selection],
        }
        data = StepsDataModule(steps_per_epoch, validation is not None)
        return Stage(plan, data, max_epochs, options, checkpoints, selection, novelty)

    def finish(self, stage: Stage) -> TrainingReport:
        """Let retrieval and the law of replicates know all populations, and report.

        Populations that were held out to score the network are evidence for predictions all the same.
        """
        plan, selection = stage.plan, stage.selection
        if not isinstance(plan, GeneratorTrainingPlan) or selection is None:
            raise TypeError("finish needs the second stage.")
        module = self.module
        if len(self.held_out):
            self._retrieve(self.measured, None if module.by_state is None else module.by_state.states)
            self._set_replicates(self.measured, self._n_factors(plan.objective))
        if module.retrieval is not None:
            folds = fold_evidence(self.measured, module, module.retrieval, self.matrix, self.seed)
            module.retrieval = replace(module.retrieval, folds=folds)
        table, retrieval, result = self.measured.table, self.module.retrieval, selection.result
        if not all(bool(p.isfinite().all()) for p in self.module.generator_ema.parameters()):
            result = replace(result, weight=0.0, reason="The network is not used: its training diverged (lower lr).")
        self.module.generator_ema.network_weight.fill_(result.weight)
        factors = self.module.generator_ema.replicate_factors
        return TrainingReport(
            n_populations=len(table),
            n_conditions=len(np.unique(table.condition)),
            n_contexts=len(np.unique(table.context)),
            n_replicated=int((np.bincount(table.condition) > 1).sum()) if len(table) else 0,
            replicate_directions=int(factors.any(0).sum()),
            retrieval={} if retrieval is None else {str(way): share for way, share in retrieval.explained.items()},
            held_out=dict(Counter(map(str, stage.novelty))),
            network_weight=result.weight,
            network_reason=result.reason,
            network={k: v for k, v in asdict(result).items() if k not in ("weight", "reason")},
            little_evidence=tuple(table.little_evidence(FEW_CELLS)),
            notes=() if retrieval is None else retrieval.notes,
            settings={
                "training": asdict(SETTINGS),
                "responses": asdict(ResponseSettings()),
                "retrieval": asdict(self.module.retrieval_settings),
                "diffusion": plan.settings(),
            },
        )

    def populations(self) -> pd.DataFrame:
        """One row per population: labels, numbers of cells and controls, and whether it was held out."""
        table = self.measured.table
        return table.report.assign(held_out=np.isin(np.arange(len(table)), self.held_out))

    @staticmethod
    def _n_factors(objective: str) -> int | None:
        """Directions in which draws may vary, at most: objectives other than the energy score ask for none."""
        return None if objective == "energy_score" else 0

    def _retrieve(self, populations: MeasuredPopulations, states: States | None | Literal["choose"] = "choose") -> None:
        module, responses = self.module, populations.responses
        module.retrieval = module.by_state = None
        if len(responses):
            module.retrieval = Retrieval.fit(responses, self.features, module.retrieval_settings, self.seed)
            search = StateSearch(populations, module.retrieval, module.expression, self.seed)
            if states == "choose":
                module.by_state = search.choose()
            elif states is not None:
                module.by_state = search.fit(states)

    def _set_replicates(self, populations: MeasuredPopulations, n_factors: int | None) -> None:
        """Give both generators the law of replicates."""
        most = self.module.generator.n_population_noise if n_factors is None else n_factors
        found = replicate_factors(populations, most)
        factors = torch.as_tensor(found, dtype=torch.float32, device=self.latent.device)
        for generator in (self.module.generator, self.module.generator_ema):
            generator.set_replicates(factors)

    def _training_set(
        self, training: MeasuredPopulations, rehearse: bool
    ) -> tuple[PopulationSampler, PopulationTensors]:
        retrieval, device = self.module.retrieval, self.latent.device
        n, rng = len(training.table), np.random.default_rng(self.seed)
        rows = np.sort(rng.permutation(n)[: SETTINGS.rehearsed])  # what is retrieved of each costs as much as there are
        rehearse = rehearse and retrieval is not None
        priors = [] if not rehearse else rehearsed_priors(training, retrieval, self.module.by_state, rows, device)
        some = training.take(rows)
        return self._sampler(some.table), population_tensors(some, priors, device)

    def _validation_set(self) -> tuple[tuple[PopulationSampler, PopulationTensors], list[Novelty]]:
        held_out = self.measured.take(self.held_out)
        if self.module.retrieval is None:
            raise ValueError(
                f"All {len(self.held_out)} populations would be held out and none trained on: lower validation_size."
            )
        conditions, by_state = held_out.responses.conditions, self.module.by_state
        retrieved = self.module.retrieval.predict(conditions)
        of_states = None
        if by_state is not None:
            where = response_of_states(held_out, by_state.states, by_state.retrieval.settings).conditions
            of_states = by_state.states, where, by_state.retrieval.predict(where)
        prior = make_prior(retrieved, conditions, of_states, self.latent.device)
        tensors = population_tensors(held_out, [prior], self.latent.device)
        return (self._sampler(held_out.table), tensors), retrieved.novelty

    def _sampler(self, table: PopulationTable) -> PopulationSampler:
        perturbed = len(table) > 0
        if perturbed:
            cells, controls, group = table.cells, table.match.groups, table.match.group
        else:  # control populations, to be pretrained on
            cells, controls, group = table.controls, table.controls, np.arange(len(table.controls))
        (cells_of, controls_of) = ((g.rows, g.start, g.count) for g in (cells, controls))
        return PopulationSampler(cells_of, controls_of, torch.as_tensor(group), self.latent.device, perturbed=perturbed)
