"""A short training of a VAE on counts in memory, without a trainer: for what is tried out, not kept."""

from __future__ import annotations

from itertools import chain, islice, repeat
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scvi import REGISTRY_KEYS

from scperturbdiff.latent._batches import RowBatches
from scperturbdiff.latent._training import LatentTrainingPlan

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from scipy import sparse

    from scperturbdiff.latent._vae import LatentVAE


def train_shortly(
    vae: LatentVAE,
    counts: sparse.csr_matrix,
    batch: NDArray[np.integer],
    n_steps: int,
    batch_size: int,
    **plan_kwargs: Any,
) -> None:
    """Train a VAE for some steps; the weight of its KL term rises over half of them.

    Order and noise come from torch's global generator, as in the first stage.

    Parameters
    ----------
    vae
        The VAE.
    counts
        `(n_cells, n_genes)`.
    batch
        Batch codes, `(n_cells,)`.
    n_steps
        Steps.
    batch_size
        Cells a step.
    **plan_kwargs
        Passed to :class:`LatentTrainingPlan`.
    """
    plan = LatentTrainingPlan(vae, **plan_kwargs)
    optimizer = plan.get_optimizer_creator()(vae.parameters())
    vae.train()
    batches = RowBatches(np.arange(counts.shape[0]), batch_size, shuffle=True)
    passes = chain.from_iterable(repeat(batches))  # each in a new order
    for step, rows in enumerate(islice(passes, n_steps)):
        tensors = {
            REGISTRY_KEYS.X_KEY: torch.from_numpy(counts[rows].toarray().astype(np.float32, copy=False)),
            REGISTRY_KEYS.BATCH_KEY: torch.as_tensor(batch[rows], dtype=torch.long)[:, None],
            REGISTRY_KEYS.LABELS_KEY: torch.zeros(len(rows), 1, dtype=torch.long),
        }
        on_device = {name: value.to(vae.device) for name, value in tensors.items()}
        kl_weight = plan.max_kl_weight * min(1.0, 2 * step / n_steps)
        loss = vae(on_device, loss_kwargs={"kl_weight": kl_weight})[2].loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    vae.eval()
