"""What a stage of training is, and the first of the two: the latent space."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scvi import REGISTRY_KEYS

from scperturbdiff.data import CountReader, matrix_name, stored_layer
from scperturbdiff.diffusion import NetworkSelection, split_callbacks
from scperturbdiff.latent import CellDataModule, LatentTrainingPlan
from scperturbdiff.progress import StageName
from scperturbdiff.training._parallel import OwnNoise, Processes
from scperturbdiff.training._settings import SETTINGS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import lightning.pytorch as pl
    from numpy.typing import NDArray
    from scvi.data import AnnDataManager

    from scperturbdiff.module import PerturbDiffModule
    from scperturbdiff.retrieval import Novelty

logger = logging.getLogger("scvi.scperturbdiff")  # follows scvi.settings.verbosity

MAPPED_BYTES = 2**28
"""Latent vectors of all cells that take more bytes are kept in a file."""


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

    Unless asked for, a trained model's VAE is kept, and one adapted from a reference is trained shortly. An untrained
    one that is kept is warned about.
    """
    if vae is None:
        vae = 0 if trained else default_vae_epochs(n_cells, batch_size)
        vae = math.ceil(vae / 5) if adapted else vae
    if generator is None:
        generator = SETTINGS.network_epochs
    bound = math.inf if max_epochs is None else max_epochs
    vae, generator = int(min(vae, bound)), int(min(generator, bound))
    if generator and not (vae or trained or adapted):
        logger.warning("The VAE is not trained (max_epochs_vae=0): its weights are random, and predictions as well.")
    return vae, generator


def latent_stage(
    module: PerturbDiffModule,
    manager: AnnDataManager,
    max_epochs: int,
    batch_size: int,
    train_size: float,
    trainer: dict[str, Any],
    processes: Processes = Processes(),
    seed: int = 0,
    **plan_kwargs: Any,
) -> Stage:
    """Stage 1: train the VAE on all cells; by default the weight of its KL term rises over half of the epochs.

    Several `processes` share each batch; `seed` is that of the order and the noise they need.
    """
    module.vae.train()
    if plan_kwargs.get("n_steps_kl_warmup") is not None:  # scvi-tools would prefer its default of 400 epochs
        plan_kwargs.setdefault("n_epochs_kl_warmup", None)
    plan_kwargs.setdefault("n_epochs_kl_warmup", max(1, max_epochs // 2))
    plan = LatentTrainingPlan(module.vae, **plan_kwargs)
    callbacks = split_callbacks(trainer.get("callbacks"))[1]
    if processes.n > 1:
        callbacks = [*callbacks, OwnNoise(seed)]
    options = {**trainer, "early_stopping": False, "callbacks": [*callbacks, StageName("Cells")]}
    reader = CountReader(manager.get_from_registry(REGISTRY_KEYS.X_KEY), matrix_name(stored_layer(manager.registry)))
    data = CellDataModule(manager, reader, train_size, batch_size, processes.rank, processes.n, seed)
    return Stage(plan, data, max_epochs, options)


def encode_cells(module: PerturbDiffModule, blocks: Iterable[Any], n_cells: int) -> torch.Tensor:
    """Latent vectors `(n_cells, n_latent)` of blocks of counts, on the module's device.

    More than fit into memory several times over are kept in a file for temporary ones that has no name: the system
    reads of it what is needed, and removes it with the last use of it.
    """
    module.eval()
    shape = n_cells, len(module.latent_mean)
    if 4 * shape[0] * shape[1] > MAPPED_BYTES:
        with TemporaryFile() as file:
            values: NDArray[np.float32] = np.memmap(file, np.float32, "w+", shape=shape)
    else:
        values = np.empty(shape, np.float32)
    latent, start = torch.from_numpy(values), 0
    for block in blocks:
        stop = start + block.shape[0]
        latent[start:stop] = module.encode([block])
        start = stop
    return latent.to(module.device)


def standardize_cells(module: PerturbDiffModule, latent: torch.Tensor) -> torch.Tensor:
    """Fix the scale of the latent space, and standardise the cells in place."""
    module.set_latent_scale(latent)
    return latent.sub_(module.latent_mean).div_(module.latent_scale)
