"""Drawing of populations on the device: index arithmetic on a resident table of latent vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
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
        Rows of the cells of each population.
    controls
        Rows of the control cells of each group of controls.
    control_group
        Group of controls of each population, `(n_populations,)`.
    device
        Where to draw.
    perturbed
        Whether the populations have conditions of their own; else they are control populations, numbered -1.
    """

    def __init__(
        self,
        cells: Groups,
        controls: Groups,
        control_group: Tensor,
        device: torch.device | str,
        *,
        perturbed: bool = True,
    ) -> None:
        self.cells, self.controls = (GroupIndex(groups, device) for groups in (cells, controls))
        self.control_group, self.perturbed = control_group.to(device), perturbed
        self.n_populations = len(cells[1])
        self.device = torch.device(device)
        self.rank, self.n_ranks = 0, 1
        self.own: Tensor | None = None

    def share(self, rank: int, n_ranks: int) -> None:
        """Draw, as process `rank` of `n_ranks`, only populations that none of the others draws.

        They are dealt anew whenever rows are reordered, as many to each process, so that all are drawn as often.

        Raises
        ------
        ValueError
            If there are fewer populations than processes.
        """
        if self.n_populations < n_ranks:
            raise ValueError(
                f"{n_ranks} processes are too many for {self.n_populations} populations to train on: each draws its "
                f"own, so use {self.n_populations} at most."
            )
        self.rank, self.n_ranks = rank, n_ranks
        if n_ranks > 1:
            self.own = torch.arange(self.n_populations, device=self.device)[rank::n_ranks]

    def shuffle(self) -> None:
        """Reorder the rows within all groups; once an epoch is enough. All processes need the same random state."""
        self.cells.shuffle()
        self.controls.shuffle()
        if self.n_ranks > 1:
            each = self.n_populations // self.n_ranks
            dealt = torch.randperm(self.n_populations, device=self.device)
            self.own = dealt[self.rank * each : (self.rank + 1) * each]

    def draw(self, n_populations: int, n_cells: int, n_draws: int) -> PopulationBatch:
        """Draw `n_populations` of up to `n_cells` cells."""
        n = self.n_populations if self.own is None else len(self.own)
        population = torch.randint(n, (n_populations,), device=self.device)
        if self.own is not None:
            population = self.own[population]
        rows, mask = self.cells.draw(population, n_cells)
        drawn, _ = self.controls.draw(self.control_group[population], n_cells * n_draws)
        starts = drawn.unflatten(-1, (n_draws, n_cells))
        number = population if self.perturbed else torch.full_like(population, -1)
        return PopulationBatch(number, rows, mask, starts, starts[:, 0])
