"""Drawing of populations on the device: index arithmetic on a resident table of latent vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Groups = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
    """Row numbers by group, and where each group starts and how many rows it has."""


# Primes beyond any group size: multiplication by one is a permutation of the rows of a group.
_PRIMES = (
    1_000_000_007,
    1_000_000_009,
    1_000_000_021,
    1_000_000_033,
    1_000_000_087,
    1_000_000_093,
    1_000_000_097,
    1_000_000_103,
)


class GroupIndex:
    """Groups of rows on a device, from which cells are drawn without loops and without host synchronisation.

    Parameters
    ----------
    groups
        Rows of each group.
    device
        Where to keep them.
    """

    def __init__(self, groups: Groups, device: torch.device | str) -> None:
        self.rows, self.start, self.count = (torch.as_tensor(part, device=device) for part in groups)
        self._primes = torch.tensor(_PRIMES, device=device)
        self._group = torch.repeat_interleave(torch.arange(len(self.start), device=device), self.count)

    def shuffle(self) -> None:
        """Put the rows of every group in a new random order."""
        order = torch.argsort(torch.rand(len(self.rows), device=self.rows.device))
        order = order[torch.argsort(self._group[order], stable=True)]
        self.rows = self.rows[order]

    def draw(self, group: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Rows `(..., n)` of `group` `(...)` and a mask that is `True` for distinct ones.

        The first `count` rows are distinct; a smaller group goes round again, and there the mask is `False`.
        """
        count, start = self.count[group][..., None], self.start[group][..., None]
        step = self._primes[torch.randint(len(_PRIMES), group.shape, device=group.device)][..., None]
        offset = (torch.rand(group.shape, device=group.device)[..., None] * count).long()
        j = torch.arange(n, device=group.device)
        return self.rows[start + (offset + j * step) % count], j < count


@dataclass(frozen=True)
class PopulationBatch:
    """Populations drawn for one training step.

    Attributes
    ----------
    group
        Number of each population in the table, `(b,)`; -1 for control populations.
    cells
        Rows of its cells, `(b, m)`.
    mask
        Which of them there are, `(b, m)`.
    starts
        Rows of the control cells that each draw starts from, `(b, n_draws, m)`.
    controls
        Rows of the control cells shown to the network, `(b, n_controls)`.
    """

    group: Tensor
    cells: Tensor
    mask: Tensor
    starts: Tensor
    controls: Tensor


class PopulationSampler:
    """Draws training populations with their controls.

    Parameters
    ----------
    cells
        Rows of the treated cells of each population.
    pools
        Rows of the control cells of each pool.
    pool
        Pool of each population, `(n_populations,)`.
    controls
        Rows of control populations, which are trained on as populations without a perturbation.
    p_control
        Share of control populations among those drawn.
    device
        Where to draw.
    """

    def __init__(
        self, cells: Groups, pools: Groups, pool: Tensor, controls: Groups, p_control: float, device: torch.device | str
    ) -> None:
        self.cells, self.pools, self.controls = (GroupIndex(g, device) for g in (cells, pools, controls))
        self.pool = pool.to(device)
        self.n_populations, self.n_controls = len(cells[1]), len(controls[1])
        self.p_control = 1.0 if self.n_populations == 0 else p_control
        self.device = torch.device(device)

    def shuffle(self) -> None:
        """Reorder the rows within all groups; once an epoch is enough."""
        for index in (self.cells, self.pools, self.controls):
            index.shuffle()

    def draw(self, n_populations: int, n_cells: int, n_draws: int) -> PopulationBatch:
        """Draw `n_populations` of up to `n_cells` cells; control populations come last."""
        n_control = round(n_populations * self.p_control)
        parts = []
        if n_populations > n_control:
            group = torch.randint(self.n_populations, (n_populations - n_control,), device=self.device)
            parts.append(self._draw(self.cells, group, self.pools, self.pool[group], group, n_cells, n_draws))
        if n_control:
            group = torch.randint(self.n_controls, (n_control,), device=self.device)
            none = torch.full_like(group, -1)
            parts.append(self._draw(self.controls, group, self.controls, group, none, n_cells, n_draws))
        return PopulationBatch(*(torch.cat(field) for field in zip(*parts, strict=True)))

    @staticmethod
    def _draw(
        cells: GroupIndex, group: Tensor, pools: GroupIndex, pool: Tensor, name: Tensor, n_cells: int, n_draws: int
    ) -> tuple[Tensor, ...]:
        rows, mask = cells.draw(group, n_cells)
        drawn, _ = pools.draw(pool, n_cells * n_draws)
        starts = drawn.unflatten(-1, (n_draws, n_cells))
        return name, rows, mask, starts, starts[:, 0]
