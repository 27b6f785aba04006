"""The two stages of training, each built from the module and the cells; the model runs them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scperturbdiff.data import PopulationTable, iter_rows
from scperturbdiff.diffusion import (
    SELECTION_METRIC,
    Components,
    GeneratorTrainingPlan,
    NetworkSelection,
    PopulationSampler,
    PopulationTensors,
    Prior,
    RepeatableEpochs,
    StepsDataModule,
    split_callbacks,
)
from scperturbdiff.latent import CellDataModule, LatentTrainingPlan
from scperturbdiff.report import FEW_CELLS, TrainingReport
from scperturbdiff.responses import MeasuredPopulations, ResponseSettings, measure_populations, replicate_factors
from scperturbdiff.retrieval import Retrieval, Retrieved

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import lightning.pytorch as pl
    import pandas as pd
    from numpy.typing import NDArray
    from scvi.data import AnnDataManager

    from scperturbdiff.module import PerturbDiffModule
    from scperturbdiff.retrieval import Novelty


@dataclass(frozen=True)
class TrainingSettings:
    """How long the stages are trained and what is held out.

    Attributes
    ----------
    latent_passes, latent_min_steps, latent_max_steps
        Steps of the first stage: so many passes over the cells, within these bounds.
    network_epochs, steps_per_epoch
        Length of the second stage.
    min_populations
        Populations from which on some are held out.
    held_out
        How many at least: five say too little of a network.
    many_replicates
        Populations of a condition from which training shows the response retrieved from all of them, not the others'.
    """

    latent_passes: int = 15
    latent_min_steps: int = 1250
    latent_max_steps: int = 5000
    network_epochs: int = 30
    steps_per_epoch: int = 50
    min_populations: int = 4
    held_out: int = 8
    many_replicates: int = 4


SETTINGS = TrainingSettings()


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
    """

    plan: pl.LightningModule
    data: pl.LightningDataModule
    max_epochs: int
    options: dict[str, Any] = field(default_factory=dict)
    checkpoints: Sequence[pl.Callback] = ()
    selection: NetworkSelection | None = None


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


@torch.no_grad()
def encode_cells(module: PerturbDiffModule, matrix: Any, chunk: int = 4096) -> torch.Tensor:
    """Latent vectors `(n_cells, n_latent)` of counts `(n_cells, n_genes)`, on the module's device."""
    module.eval()
    parts = []
    for block in iter_rows(matrix, chunk=chunk):
        dense = block.toarray() if hasattr(block, "toarray") else np.asarray(block)
        parts.append(module.vae.encode(torch.as_tensor(dense, dtype=torch.float32, device=module.device)))
    return torch.cat(parts)


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
    features
        Feature table of components.
    seed
        Of all choices.
    """

    module: PerturbDiffModule
    measured: MeasuredPopulations
    training: NDArray[np.int64]
    held_out: NDArray[np.int64]
    latent: torch.Tensor
    features: NDArray[np.float64] | None
    seed: int

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
        measured = measure_populations(table, latent, matrix, batch.ravel(), module.shares)
        return cls(module, measured, training, held_out, latent, features, seed)

    def stage(
        self,
        max_epochs: int,
        early_stopping: bool,
        trainer: dict[str, Any],
        steps_per_epoch: int = SETTINGS.steps_per_epoch,
        gradient_clip_val: float = 1.0,
        ckpt_path: str | Path | None = None,
        **plan_kwargs: Any,
    ) -> Stage:
        """Stage 2: retrieve responses, train the generator on populations."""
        module, training = self.module, self.measured.take(self.training)
        self._retrieve(training)
        self._set_replicates(training, self._n_factors(plan_kwargs.get("objective", "energy_score")))
        sampler, tensors = self._training_set(training)
        validation, novelty = self._validation_set() if len(self.held_out) else (None, None)
        table = self.measured.table
        selection = NetworkSelection(replicated=len(table) == 0 or bool((count_replicates(table) > 1).any()))
        steps = max_epochs * steps_per_epoch
        plan = GeneratorTrainingPlan(
            module, self.latent, sampler, tensors, validation, selection, n_steps=steps, seed=self.seed, **plan_kwargs
        )
        plan.held_out_novelty = None if novelty is None else [str(way) for way in novelty]
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
        return Stage(plan, data, max_epochs, options, checkpoints, selection)

    def finish(self, stage: Stage) -> TrainingReport:
        """Let retrieval and the law of replicates know all populations, and report.

        Populations that were held out to judge the network are evidence for predictions all the same.
        """
        plan, selection = stage.plan, stage.selection
        if not isinstance(plan, GeneratorTrainingPlan) or selection is None:
            raise TypeError("finish needs the second stage.")
        novelty = [] if plan.held_out_novelty is None else plan.held_out_novelty
        if len(self.held_out):
            self._retrieve(self.measured)
            self._set_replicates(self.measured, self._n_factors(plan.objective))
        table, retrieval, result = self.measured.table, self.module.retrieval, selection.result
        self.module.generator_ema.network_weight.fill_(result.weight)
        factors = self.module.generator_ema.replicate_factors
        return TrainingReport(
            n_populations=len(table),
            n_conditions=len(np.unique(table.condition)),
            n_contexts=len(np.unique(table.context)),
            n_replicated=int((np.bincount(table.condition) > 1).sum()) if len(table) else 0,
            replicate_directions=int(factors.any(0).sum()),
            retrieval={} if retrieval is None else {str(way): share for way, share in retrieval.explained.items()},
            held_out=dict(Counter(novelty)),
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

    def _retrieve(self, populations: MeasuredPopulations) -> None:
        responses = populations.responses
        self.module.retrieval = None
        if len(responses):
            self.module.retrieval = Retrieval.fit(responses, self.features, self.module.retrieval_settings, self.seed)

    def _set_replicates(self, populations: MeasuredPopulations, n_factors: int | None) -> None:
        """Give both generators the law of replicates."""
        most = self.module.generator.n_population_noise if n_factors is None else n_factors
        found = replicate_factors(populations, most)
        factors = torch.as_tensor(found, dtype=torch.float32, device=self.latent.device)
        for generator in (self.module.generator, self.module.generator_ema):
            generator.set_replicates(factors)

    def _training_set(self, training: MeasuredPopulations) -> tuple[PopulationSampler, PopulationTensors]:
        retrieval, table = self.module.retrieval, training.table
        retrieved = [] if retrieval is None else rehearsed_responses(retrieval, table)
        return self._sampler(table), population_tensors(training, retrieved, self.latent.device)

    def _validation_set(self) -> tuple[tuple[PopulationSampler, PopulationTensors], list[Novelty]]:
        held_out = self.measured.take(self.held_out)
        if self.module.retrieval is None:
            raise ValueError(
                f"All {len(self.held_out)} populations would be held out and none trained on: lower validation_size."
            )
        retrieved = self.module.retrieval.predict(held_out.responses.conditions)
        tensors = population_tensors(held_out, [retrieved], self.latent.device)
        return (self._sampler(held_out.table), tensors), retrieved.novelty

    def _sampler(self, table: PopulationTable) -> PopulationSampler:
        perturbed = len(table) > 0
        if perturbed:
            cells, controls, group = table.cells, table.match.pools, table.match.pool
        else:  # control populations, to be pretrained on
            cells, controls, group = table.controls, table.controls, np.arange(len(table.controls))
        (cells_of, controls_of) = ((g.rows, g.start, g.count) for g in (cells, controls))
        return PopulationSampler(cells_of, controls_of, torch.as_tensor(group), self.latent.device, perturbed=perturbed)


def split_populations(
    table: PopulationTable, validation_size: float | None, seed: int, has_features: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of the populations to train on and of those held out.

    Whole conditions are held out at a time (all batches of a perturbation in a context).

    A perturbation that training would then not know at all says nothing about when to stop: that share of its
    populations is held out if there are several, else none.
    """
    n = len(table)
    if validation_size is None:
        enough = min(max(SETTINGS.held_out, round(0.1 * n)), n // 3)
        validation_size = enough / n if n >= SETTINGS.min_populations else 0.0
    if not 0 <= validation_size < 1:
        raise ValueError(f"validation_size={validation_size} must lie in [0, 1): the share of populations held out.")
    wanted = round(n * validation_size)
    condition = table.condition
    rng = np.random.default_rng(seed)
    order = rng.permutation(condition.max() + 1) if n else np.empty(0, int)
    held = np.zeros(n, bool)
    for c in order:
        members = np.flatnonzero(condition == c)
        left = table.component[~held & (condition != c)]
        if not has_features and not np.isin(table.component[members], np.append(left, -1)).all():
            few = max(1, round(validation_size * len(members))) if len(members) > 1 else 0
            members = rng.choice(members, few, replace=False)
        if held.sum() + len(members) > wanted:
            continue
        held[members] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def population_tensors(
    populations: MeasuredPopulations, retrieved: list[Retrieved], device: torch.device
) -> PopulationTensors:
    """Conditions of populations on the device, with a last row for control populations.

    Parameters
    ----------
    populations
        Populations.
    retrieved
        Their retrieved responses for each way of being new; with none, no response.
    device
        Where to.
    """
    table, centre = populations.table, populations.responses.conditions.control_mean

    def put(values: NDArray, last: float, dtype: torch.dtype) -> torch.Tensor:
        out = torch.as_tensor(values, dtype=dtype)
        return torch.cat([out, torch.full((1, *out.shape[1:]), last, dtype=dtype)]).to(device)

    if not retrieved:
        retrieved = [Retrieved.nothing(*centre.shape)]
    shift, variance, spread = (
        torch.stack([put(part, 0.0, torch.float32) for part in parts])
        for parts in zip(*((r.shift, r.variance, r.spread) for r in retrieved), strict=True)
    )
    centres = put(centre, 0.0, torch.float32).expand(len(retrieved), -1, -1)
    return PopulationTensors(
        Components(put(table.component, -1, torch.long), put(table.dose, 0.0, torch.float32)),
        put(table.categories, -1, torch.long),
        put(table.numbers, 0.0, torch.float32),
        Prior(shift, variance, spread, centres),
    )


def useful_novelties(table: PopulationTable, has_features: bool) -> list[Novelty]:
    """Ways of being new that training can rehearse on these populations."""
    if len(table) < 2:
        return ["seen"]
    out: list[Novelty] = ["replicate"]
    n_contexts = len(np.unique(table.context))
    if n_contexts > 1:
        out.append("context")
    if n_contexts > 1 or (count_replicates(table) > 1).any():
        out.append("pair")
    if has_features:
        out.append("perturbation")
    return out


def rehearsed_responses(retrieval: Retrieval, table: PopulationTable) -> list[Retrieved]:
    """Retrieved responses of the training populations for each way of being new that training rehearses.

    Where a condition has many replicates, leaving one out tells which one it was: the mean of the others and what is
    left out add up to the same sum. A network that has learned to solve for it invents a replicate when it is shown the
    mean of all, as it is at prediction. From `many_replicates` on that mean is what training shows, too.
    """
    out: list[Retrieved] = []
    for novelty in useful_novelties(table, retrieval.features is not None):
        found = retrieval.leave_out(novelty)
        if novelty == "replicate" and (many := count_replicates(table) >= SETTINGS.many_replicates).any():
            found.put(np.flatnonzero(many), retrieval.leave_out("seen", np.flatnonzero(many)))
        out.append(found)
    return out


def count_replicates(table: PopulationTable) -> NDArray[np.int64]:
    """Number of populations of each population's condition."""
    replicates: NDArray[np.int64] = np.bincount(table.condition)[table.condition]
    return replicates
