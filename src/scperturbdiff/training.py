"""The two stages of training, run through scvi-tools' trainer."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scvi.train import TrainRunner

from scperturbdiff.data import Ragged, iter_rows
from scperturbdiff.diffusion import (
    VALIDATION_METRIC,
    GeneratorTrainingPlan,
    KeepBestGenerator,
    PopulationSampler,
    PopulationTensors,
    RepeatableEpochs,
    StepsDataModule,
    split_callbacks,
)
from scperturbdiff.latent import CellDataModule, LatentTrainingPlan
from scperturbdiff.responses import count_response, describe, replicate_law
from scperturbdiff.retrieval import AnchorPrediction

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd
    from numpy.typing import NDArray

    from scperturbdiff.data import PopulationTable
    from scperturbdiff.model import PerturbDiff


from typing import TYPE_CHECKING

from torch import Tensor

from scperturbdiff.diffusion import Anchor, Components
from scperturbdiff.retrieval import ResponseAnchor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from scperturbdiff.data import PopulationTable
    from scperturbdiff.retrieval import Novelty

    Rows = NDArray[np.integer]


logger = logging.getLogger(__name__)

VAE_MIN_STEPS, VAE_MAX_STEPS, VAE_PASSES = 1250, 5000, 15
"""Steps of the first stage: this many passes over the cells, within these bounds."""
GENERATOR_EPOCHS, STEPS_PER_EPOCH = 30, 50
MIN_POPULATIONS_TO_VALIDATE, JUDGES = 4, 8
"""Populations from which on some are held out, and how many at least: five say too little of a network."""


@dataclass(frozen=True)
class TrainerArguments:
    """What both stages hand to scvi-tools' trainer."""

    accelerator: str
    devices: Any
    kwargs: dict[str, Any]


def default_vae_epochs(n_cells: int, batch_size: int) -> int:
    """Epochs that make a sensible number of steps for this many cells."""
    per_epoch = max(1, n_cells // batch_size)
    steps = min(max(VAE_PASSES * per_epoch, VAE_MIN_STEPS), VAE_MAX_STEPS)
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
        generator = GENERATOR_EPOCHS
    bound = math.inf if max_epochs is None else max_epochs
    return int(min(vae, bound)), int(min(generator, bound))


def _run(
    model: PerturbDiff,
    plan: Any,
    data: Any,
    max_epochs: int,
    trainer: TrainerArguments,
    checkpoints: Sequence[Any] = (),
    **kwargs: Any,
) -> dict[str, pd.DataFrame]:
    """Run one stage and return its history (the runner would drop the keys of a second stage)."""
    model.history_, model.is_trained_ = {}, False
    runner = TrainRunner(
        model,
        training_plan=plan,
        data_splitter=data,
        max_epochs=max_epochs,
        accelerator=trainer.accelerator,
        devices=trainer.devices,
        **{**trainer.kwargs, **kwargs},
    )
    runner.trainer.callbacks.extend(checkpoints)
    runner()
    return model.history_ or {}


def train_vae(
    model: PerturbDiff,
    max_epochs: int,
    batch_size: int,
    train_size: float,
    trainer: TrainerArguments,
    max_kl_weight: float = 0.05,
    n_epochs_kl_warmup: int | None = None,
    **plan_kwargs: Any,
) -> dict[str, pd.DataFrame]:
    """Stage 1: train the VAE on all cells; the weight of its KL term rises over the first half of the epochs."""
    model.module.vae.train()
    plan = LatentTrainingPlan(
        model.module.vae,
        max_kl_weight=max_kl_weight,
        n_epochs_kl_warmup=n_epochs_kl_warmup or max(1, max_epochs // 2),
        **plan_kwargs,
    )
    return _run(
        model,
        plan,
        CellDataModule(model.adata_manager, train_size, batch_size),
        max_epochs,
        trainer,
        early_stopping=False,
        callbacks=split_callbacks(trainer.kwargs.get("callbacks"))[1],
    )


@torch.no_grad()
def encode_training_cells(model: PerturbDiff, chunk: int = 4096) -> torch.Tensor:
    """Latent vectors of all cells the model was set up with, `(n_cells, n_latent)`, on the module's device."""
    model.module.eval()
    matrix = model.adata_manager.get_from_registry("X")
    parts = []
    for block in iter_rows(matrix, chunk=chunk):
        dense = block.toarray() if hasattr(block, "toarray") else np.asarray(block)
        parts.append(model.module.vae.encode(torch.as_tensor(dense, dtype=torch.float32, device=model.module.device)))
    return torch.cat(parts)


@dataclass(frozen=True)
class GeneratorData:
    """Populations the second stage trains on and is validated on."""

    table: PopulationTable
    training: NDArray[np.int64]
    validation: NDArray[np.int64]


def split_populations(
    table: PopulationTable, validation_size: float | None, seed: int, has_features: bool = False
) -> GeneratorData:
    """Hold out a share of the populations, whole conditions at a time (all batches of a perturbation in a context).

    A perturbation that training would then not know at all says nothing about when to stop: that share of its
    populations is held out if there are several, else none.
    """
    n = len(table)
    if validation_size is None:
        enough = min(max(JUDGES, round(0.1 * n)), n // 3)
        validation_size = enough / n if n >= MIN_POPULATIONS_TO_VALIDATE else 0.0
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
    return GeneratorData(table, np.flatnonzero(~held), np.flatnonzero(held))


def train_generator(
    model: PerturbDiff,
    table: PopulationTable,
    max_epochs: int,
    validation_size: float | None,
    early_stopping: bool,
    seed: int,
    trainer: TrainerArguments,
    steps_per_epoch: int = STEPS_PER_EPOCH,
    gradient_clip_val: float = 1.0,
    ckpt_path: str | Path | None = None,
    **plan_kwargs: Any,
) -> dict[str, pd.DataFrame]:
    """Stage 2: fix the latent space, retrieve anchors, train the generator on populations."""
    module = model.module
    latent = encode_training_cells(model)
    module.set_latent_scale(latent)
    latent = module.standardize(latent)
    features = model.conditions.feature_matrix()
    data = split_populations(table, validation_size, seed, has_features=features is not None)
    training = table.take(data.training)
    fit_anchor(module.anchor, training, latent, features, seed)
    # the other objectives ask for draws that do not vary
    varies = plan_kwargs.get("objective", "energy_score") == "energy_score"
    _start_from_replicates(module, training, latent, module.generator.n_population_noise if varies else 0)
    sampler, tensors = _training_set(module, training, latent, features)
    validation = (
        _validation_set(module, table.take(data.validation), latent, features) if len(data.validation) else None
    )
    plan = GeneratorTrainingPlan(
        module, latent, sampler, tensors, validation, n_steps=max_epochs * steps_per_epoch, seed=seed, **plan_kwargs
    )
    module.generator.train()
    checkpoints, others = split_callbacks(trainer.kwargs.get("callbacks"))
    replicated = len(table) == 0 or bool((count_replicates(table) > 1).any())
    callbacks = [*others, RepeatableEpochs(seed), KeepBestGenerator(replicated)]
    options: dict[str, Any] = {
        "early_stopping": early_stopping and validation is not None,
        "early_stopping_monitor": VALIDATION_METRIC,
        "early_stopping_patience": 10,
        "callbacks": callbacks,
        "gradient_clip_val": gradient_clip_val,
        "check_val_every_n_epoch": 1,
        "ckpt_path": ckpt_path,
    }
    options |= {k: v for k, v in trainer.kwargs.items() if k != "callbacks"}
    history = _run(
        model,
        plan,
        StepsDataModule(steps_per_epoch, validation is not None),
        max_epochs,
        trainer,
        checkpoints,
        **options,
    )
    model.populations_ = table.report.assign(held_out=np.isin(np.arange(len(table)), data.validation))
    _keep_evidence(model, data, latent, features, seed)
    return history


def _keep_evidence(
    model: PerturbDiff, data: GeneratorData, latent: torch.Tensor, features: NDArray[np.float64] | None, seed: int
) -> None:
    """Let the anchor know all populations: those held out to stop in time are evidence for predictions all the same."""
    anchor, table = model.module.anchor, data.table
    if len(data.validation):
        fit_anchor(anchor, table, latent, features, seed)
    if len(table):
        registry = model.adata_manager.get_from_registry
        found = count_response(model.module.eval(), registry("X"), registry("batch").ravel(), latent, table)
        anchor.keep_counts(*found, features, seed=seed)


def _start_from_replicates(module: Any, table: PopulationTable, latent: torch.Tensor, max_factors: int) -> None:
    """Give both networks the law of the replicates of `table`."""
    law = replicate_law(table, latent, max_factors)
    for network in (module.generator, module.generator_ema):
        network.set_replicates(*(torch.as_tensor(x, dtype=torch.float32, device=latent.device) for x in law))


def _training_set(
    module: Any, table: PopulationTable, latent: torch.Tensor, features: NDArray[np.float64] | None
) -> tuple[PopulationSampler, PopulationTensors]:
    known = module.anchor.train_conditions
    anchors = rehearsed_anchors(module.anchor, table, features) if len(table) else []
    centre = known.control_mean if len(table) else np.zeros((0, latent.shape[1]))
    tensors = population_tensors(table, anchors, centre, latent.device)
    return _sampler(table, latent.device), tensors


def _validation_set(
    module: Any, table: PopulationTable, latent: torch.Tensor, features: NDArray[np.float64] | None
) -> tuple[PopulationSampler, PopulationTensors]:
    conditions = describe(table, latent)[0]
    novelty = module.anchor.novelty(conditions)
    predicted = [
        module.anchor.predict(conditions.take(slice(i, i + 1)), novelty[i], features) for i in range(len(table))
    ]
    joined = AnchorPrediction(*(np.concatenate(parts) for parts in zip(*predicted, strict=True)))
    tensors = population_tensors(table, [joined], conditions.control_mean, latent.device)
    return _sampler(table, latent.device), tensors


def _sampler(table: PopulationTable, device: torch.device, p_control: float = 0.125) -> PopulationSampler:
    empty = Ragged.from_lists([])
    controls = table.controls if len(table.controls) else empty
    return PopulationSampler(
        table.cells, table.match.pools, torch.as_tensor(table.match.pool), controls, p_control, device
    )


MANY_REPLICATES = 4
"""Populations of a condition from which training shows the anchor of all of them instead of the others'."""


def population_tensors(
    table: PopulationTable,
    anchors: list[AnchorPrediction],
    centre: NDArray[np.floating],
    device: torch.device,
) -> PopulationTensors:
    """Move the conditions of `table` to the device and append the row of control populations.

    Parameters
    ----------
    table
        Populations.
    anchors
        Retrieved responses for each way of being new; with none, no response.
    centre
        Means of the matched controls, `(n_populations, n_latent)`.
    device
        Where to.
    """

    def put(values: NDArray, last: float, dtype: torch.dtype) -> Tensor:
        out = torch.as_tensor(values, dtype=dtype)
        return torch.cat([out, torch.full((1, *out.shape[1:]), last, dtype=dtype)]).to(device)

    if not anchors:
        anchors = [AnchorPrediction.none(*centre.shape)]
    shift, variance, spread = (
        torch.stack([put(part, 0.0, torch.float32) for part in parts])
        for parts in zip(*((a.mean, a.variance, a.spread) for a in anchors), strict=True)
    )
    centres = put(centre, 0.0, torch.float32).expand(len(anchors), -1, -1)
    return PopulationTensors(
        Components(put(table.component, -1, torch.long), put(table.dose, 0.0, torch.float32)),
        put(table.categories, -1, torch.long),
        put(table.numbers, 0.0, torch.float32),
        Anchor(shift, variance, spread, centres),
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


def rehearsed_anchors(
    anchor: ResponseAnchor, table: PopulationTable, features: NDArray[np.float64] | None
) -> list[AnchorPrediction]:
    """Anchors of the training populations for each way of being new that training rehearses.

    Where a condition has many replicates, leaving one out tells which one it was: the mean of the others and what is
    left out add up to the same sum. A network that has learned to solve for it invents a replicate when it is shown the
    mean of all, as it is at prediction. From `MANY_REPLICATES` on that mean is what training shows, too.
    """
    out: list[AnchorPrediction] = []
    for novelty in useful_novelties(table, features is not None):
        found = anchor.leave_out(novelty, features)
        if novelty == "replicate" and (many := count_replicates(table) >= MANY_REPLICATES).any():
            seen = anchor.leave_out("seen", features)
            found = AnchorPrediction(
                np.where(many[:, None], seen.mean, found.mean),
                np.where(many, seen.variance, found.variance),
                np.where(many, seen.spread, found.spread),
                found.library,
                found.residual,
            )
        out.append(found)
    return out


def count_replicates(table: PopulationTable) -> NDArray[np.int64]:
    """Number of populations of each population's condition."""
    replicates: NDArray[np.int64] = np.bincount(table.condition)[table.condition]
    return replicates


def fit_anchor(
    anchor: ResponseAnchor, table: PopulationTable, latent: Tensor, features: NDArray[np.float64] | None, seed: int
) -> None:
    """Fit the anchor to the populations of `table`; with none it stays empty."""
    if len(table) == 0:
        anchor.set_extra_state({})
        return
    conditions, shifts, spreads = describe(table, latent)
    anchor.fit(conditions, shifts, features, spreads, seed=seed)
