"""What the second stage trains on: latent cells, populations and retrieved anchors, as tensors on one device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from scperturbdiff.data.populations import Ragged
from scperturbdiff.module.anchor import AnchorPrediction, ResponseAnchor
from scperturbdiff.module.condition import Anchor, Condition
from scperturbdiff.module.kernel import Conditions
from scperturbdiff.module.perturbation import Components

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from scperturbdiff.data.table import PopulationTable
    from scperturbdiff.module.kernel import Novelty

    Rows = NDArray[np.integer]

MANY_REPLICATES = 4
"""Populations of a condition from which training shows the anchor of all of them instead of the others'."""


PSEUDO_CELLS = 5
"""Cells with the controls' spread that are added to each population before spreads are compared."""


def describe(table: PopulationTable, latent: Tensor) -> tuple[Conditions, NDArray[np.float64], NDArray[np.float64]]:
    """Conditions of the populations for the anchor, and their responses.

    These are the mean shifts `(n_populations, n_latent)` and the log ratios of spreads `(n_populations,)`.

    Parameters
    ----------
    table
        Populations.
    latent
        Standardised latent vectors of all cells.
    """
    values = latent.detach().cpu().numpy()
    pool_mean = group_means(values, table.match.pools)
    treated = group_means(values, table.cells)
    control = pool_mean[table.match.pool]
    n_controls = table.match.pools.count[table.match.pool]
    pool_square, square = _squares(values, table.match.pools, pool_mean), _squares(values, table.cells, treated)
    within = pool_square.sum() / max(table.match.pools.count.sum(), 1)
    noise = within * (1 / np.maximum(table.cells.count, 1) + 1 / np.maximum(n_controls, 1))
    before = (pool_square / np.maximum(table.match.pools.count - 1, 1))[table.match.pool]
    before = np.where(before > 0, before, max(within, 1e-12))  # a pool of one cell has no spread of its own
    degrees = np.maximum(table.cells.count - 1, 0)
    after = (square + PSEUDO_CELLS * before) / (degrees + PSEUDO_CELLS)
    conditions = Conditions(control, table.component, table.dose, table.context, noise)
    return conditions, treated - control, 0.5 * np.log(after / before)


def group_means(values: NDArray[np.floating], groups: Ragged) -> NDArray[np.float64]:
    """Mean of the rows `values` `(n_cells, d)` of each group, `(n_groups, d)`."""
    sums = np.zeros((len(groups), values.shape[1]))
    np.add.at(sums, np.repeat(np.arange(len(groups)), groups.count), values[groups.rows])
    return sums / np.maximum(groups.count, 1)[:, None]


def _squares(values: NDArray[np.floating], groups: Ragged, means: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum over cells of the squared deviation from the mean of their group, averaged over dimensions, `(n_groups,)`."""
    group = np.repeat(np.arange(len(groups)), groups.count)
    deviation = ((values[groups.rows] - means[group]) ** 2).mean(1)
    sums: NDArray[np.float64] = np.bincount(group, weights=deviation, minlength=len(groups)).astype(np.float64)
    return sums


@dataclass(frozen=True)
class PopulationTensors:
    """Conditions of populations on the device; the last row stands for control populations.

    Attributes
    ----------
    components, categories, numbers
        See :class:`Condition`.
    anchor
        Retrieved responses for each way of being new, :class:`Anchor` of `(n_novelties, n_populations + 1, ...)`.
    """

    components: Components
    categories: Tensor
    numbers: Tensor
    anchor: Anchor

    @property
    def n_novelties(self) -> int:
        """Ways of being new there are anchors for."""
        return len(self.anchor.shift)

    def condition(self, group: Tensor, novelty: Tensor, keep: Tensor) -> Condition:
        """Conditions of populations `group` (-1: control), retrieved as if new in the way of `novelty`."""
        return Condition(
            self.components.take(group),
            Anchor(*(x[novelty, group] for x in vars(self.anchor).values())),
            self.categories[group],
            self.numbers[group],
            keep,
        )


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
