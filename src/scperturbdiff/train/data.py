"""What the second stage trains on: latent cells, populations and retrieved anchors, as tensors on one device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from scperturbdiff.data.populations import Ragged
from scperturbdiff.module.anchor import Conditions, ResponseAnchor
from scperturbdiff.module.generator import Condition
from scperturbdiff.module.perturbation import Components

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from scperturbdiff.data.table import PopulationTable
    from scperturbdiff.module.anchor import Novelty

    Rows = NDArray[np.integer]

MANY_REPLICATES = 4
"""Populations of a condition from which training shows the anchor of all of them instead of the others'."""


def describe(table: PopulationTable, latent: Tensor) -> tuple[Conditions, NDArray[np.float64]]:
    """Conditions of the populations for the anchor, and their mean shifts `(n_populations, n_latent)`.

    Parameters
    ----------
    table
        Populations.
    latent
        Standardised latent vectors of all cells.
    """
    values = latent.detach().cpu().numpy()
    pool_mean = _group_means(values, table.match.pools)
    treated = _group_means(values, table.cells)
    control = pool_mean[table.match.pool]
    n_controls = table.match.pools.count[table.match.pool]
    within = np.mean((values[table.match.pools.rows] - np.repeat(pool_mean, table.match.pools.count, axis=0)) ** 2)
    noise = within * (1 / np.maximum(table.cells.count, 1) + 1 / np.maximum(n_controls, 1))
    conditions = Conditions(control, table.component, table.dose, table.context, noise)
    return conditions, treated - control


def _group_means(values: NDArray[np.floating], groups: Ragged) -> NDArray[np.float64]:
    sums = np.zeros((len(groups), values.shape[1]))
    np.add.at(sums, np.repeat(np.arange(len(groups)), groups.count), values[groups.rows])
    return sums / np.maximum(groups.count, 1)[:, None]


@dataclass(frozen=True)
class PopulationTensors:
    """Conditions of populations on the device; the last row stands for control populations.

    Attributes
    ----------
    components, categories, numbers
        See :class:`Condition`.
    anchor
        Retrieved shifts for each way of being new, `(n_novelties, n_populations + 1, n_latent)`.
    anchor_variance
        `(n_novelties, n_populations + 1)`.
    """

    components: Components
    categories: Tensor
    numbers: Tensor
    anchor: Tensor
    anchor_variance: Tensor

    def condition(self, group: Tensor, novelty: Tensor, keep: Tensor) -> Condition:
        """Conditions of populations `group` (-1: control), retrieved as if new in the way of `novelty`."""
        return Condition(
            self.components.take(group),
            self.anchor[novelty, group],
            self.anchor_variance[novelty, group],
            self.categories[group],
            self.numbers[group],
            keep,
        )


def population_tensors(
    table: PopulationTable,
    anchors: list[tuple[NDArray[np.floating], NDArray[np.floating]]],
    n_latent: int,
    device: torch.device,
) -> PopulationTensors:
    """Move the conditions of `table` to the device and append the row of control populations.

    Parameters
    ----------
    table
        Populations.
    anchors
        Mean `(n_populations, n_latent)` and variance `(n_populations,)` for each way of being new.
    n_latent
        Dimension of the latent space.
    device
        Where to.
    """

    def put(values: NDArray, last: float, dtype: torch.dtype) -> Tensor:
        out = torch.as_tensor(values, dtype=dtype)
        return torch.cat([out, torch.full((1, *out.shape[1:]), last, dtype=dtype)]).to(device)

    anchor = [put(mean, 0.0, torch.float32) for mean, _ in anchors] or [torch.zeros(1, n_latent, device=device)]
    variance = [put(var, 0.0, torch.float32) for _, var in anchors] or [torch.zeros(1, device=device)]
    return PopulationTensors(
        Components(put(table.component, -1, torch.long), put(table.dose, 0.0, torch.float32)),
        put(table.categories, -1, torch.long),
        put(table.numbers, 0.0, torch.float32),
        torch.stack(anchor),
        torch.stack(variance),
    )


def useful_novelties(table: PopulationTable, has_features: bool) -> list[Novelty]:
    """Ways of being new that training can rehearse on these populations."""
    if len(table) < 2:
        return ["seen"]
    out: list[Novelty] = ["replicate"]
    n_contexts = len(np.unique(table.context))
    condition = np.unique(np.concatenate([table.component, table.dose, table.context[:, None]], axis=1), axis=0)
    if n_contexts > 1:
        out.append("context")
    if len(condition) < len(table) or n_contexts > 1:
        out.append("pair")
    if has_features:
        out.append("perturbation")
    return out


def rehearsed_anchors(
    anchor: ResponseAnchor, table: PopulationTable, features: NDArray[np.float64] | None
) -> list[tuple[NDArray[np.floating], NDArray[np.floating]]]:
    """Anchors of the training populations, mean and variance, for each way of being new that training rehearses.

    Where a condition has many replicates, leaving one out tells which one it was: the mean of the others and what is
    left out add up to the same sum. A network that has learned to solve for it invents a replicate when it is shown the
    mean of all, as it is at prediction. From `MANY_REPLICATES` on that mean is what training shows, too.
    """
    out: list[tuple[NDArray[np.floating], NDArray[np.floating]]] = []
    for novelty in useful_novelties(table, features is not None):
        mean, variance = anchor.leave_out(novelty, features)
        if novelty == "replicate" and (many := _replicates(table) >= MANY_REPLICATES).any():
            seen_mean, seen_variance = anchor.leave_out("seen", features)
            mean = np.where(many[:, None], seen_mean, mean)
            variance = np.where(many, seen_variance, variance)
        out.append((mean, variance))
    return out


def _replicates(table: PopulationTable) -> NDArray[np.int64]:
    """Number of populations of each population's condition."""
    keys = np.concatenate([table.component, table.dose, table.context[:, None]], axis=1)
    _, condition, count = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    replicates: NDArray[np.int64] = count[condition.reshape(-1)]
    return replicates


def fit_anchor(
    anchor: ResponseAnchor, table: PopulationTable, latent: Tensor, features: NDArray[np.float32] | None, seed: int
) -> None:
    """Fit the anchor to the populations of `table`; with none it stays empty."""
    if len(table) == 0:
        anchor.set_extra_state({})
        return
    conditions, shifts = describe(table, latent)
    anchor.fit(conditions, shifts, None if features is None else features.astype(np.float64), seed=seed)
