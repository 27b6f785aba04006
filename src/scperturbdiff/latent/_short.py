"""A short training of a VAE on counts in memory, without a trainer: for what is tried out, not kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scvi import REGISTRY_KEYS

from scperturbdiff.latent._training import LatentTrainingPlan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from scipy import sparse

    from scperturbdiff.latent._vae import LatentVAE


def train_shortly(
    vae: LatentVAE,
    counts: sparse.csr_matrix,
    batch: NDArray[np.integer],
    n_steps: int,
    batch_size: int,
    rng: np.random.Generator,
    max_kl_weight: float = 0.05,
    **plan_kwargs: Any,
) -> None:
    """Train a VAE for some steps; the weight of its KL term rises over half of them.

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
    rng
        Draws the order of the cells.
    max_kl_weight, **plan_kwargs
        As of :class:`LatentTrainingPlan`.
    """
    plan = LatentTrainingPlan(vae, max_kl_weight=max_kl_weight, **plan_kwargs)
    optimizer = plan.get_optimizer_creator()(vae.parameters())
    vae.train()
    for step, rows in zip(range(n_steps), _batches(counts.shape[0], batch_size, rng), strict=False):
        tensors = {
            REGISTRY_KEYS.X_KEY: torch.from_numpy(counts[rows].toarray().astype(np.float32)),
            REGISTRY_KEYS.BATCH_KEY: torch.as_tensor(batch[rows], dtype=torch.long)[:, None],
            REGISTRY_KEYS.LABELS_KEY: torch.zeros(len(rows), 1, dtype=torch.long),
        }
        on_device = {name: value.to(vae.device) for name, value in tensors.items()}
        kl_weight = max_kl_weight * min(1.0, 2 * step / n_steps)
        loss = vae(on_device, loss_kwargs={"kl_weight": kl_weight})[2].loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    vae.eval()


def _batches(n_cells: int, size: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Cells in random batches, again and again."""
    while True:
        order = rng.permutation(n_cells)
        for i in range(max(1, n_cells // size)):
            yield order[i * size : (i + 1) * size]
