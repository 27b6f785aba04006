"""Populations that are left out, and what is predicted of them: evidence for predictions of counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scperturbdiff.counts import PER_CELL
from scperturbdiff.data import iter_rows
from scperturbdiff.module import dense
from scperturbdiff.responses import replicate_factors
from scperturbdiff.training._populations import left_out_prior, predicted_prior
from scperturbdiff.training._settings import SETTINGS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from scperturbdiff.diffusion import Prior
    from scperturbdiff.module import ControlSample, PerturbDiffModule
    from scperturbdiff.responses import MeasuredPopulations
    from scperturbdiff.retrieval import Novelty, Retrieved
    from scperturbdiff.training._unseen import Unseen


@dataclass(frozen=True)
class SomeCells:
    """Counts of some control and treated cells of `n` populations, `(n_cells, n_genes)` each; the control cells."""

    controls: Sequence[Tensor]
    treated: Sequence[Tensor]
    samples: Sequence[ControlSample]

    @classmethod
    def read(
        cls, module: PerturbDiffModule, populations: MeasuredPopulations, matrix: Any, rng: np.random.Generator
    ) -> SomeCells:
        """Read a random choice from counts of all cells, `(n_cells, n_genes)`, in memory or on disk."""

        def read(cells: NDArray[np.int64]) -> Tensor:
            return torch.cat([dense(part, module.device) for part in iter_rows(matrix, cells)])

        table, n = populations.table, SETTINGS.fold_cells
        chosen = [
            (table.match.groups.some(int(group), n, rng), table.cells.some(i, n, rng))
            for i, group in enumerate(table.match.group)
        ]
        controls, treated = [read(cells) for cells, _ in chosen], [read(cells) for _, cells in chosen]
        samples = [
            module.control_sample(counts, torch.as_tensor(populations.latent[cells], device=module.device))
            for counts, (cells, _) in zip(controls, chosen, strict=True)
        ]
        return cls(controls, treated, samples)


@dataclass(frozen=True)
class LeftOut:
    """Populations that are left out in one way of being new: what they did, and what is predicted of them.

    Attributes
    ----------
    novelty
        The way.
    module
        What predicts.
    populations
        These, `n`.
    found, prior
        What is predicted.
    distance
        Of their controls to the nearest known ones, `(n,)`.
    directions
        Directions along which draws vary, `(n_latent, n_directions)`; and how far in each population, `(n,)`.
    cells
        Some of their cells.
    """

    novelty: Novelty
    module: PerturbDiffModule
    populations: MeasuredPopulations
    found: Retrieved
    prior: Prior
    distance: NDArray[np.float64]
    directions: tuple[NDArray[np.float64], NDArray[np.float64]]
    cells: SomeCells

    def __len__(self) -> int:
        return len(self.populations.table)

    @classmethod
    def of_known(
        cls,
        novelty: Novelty,
        module: PerturbDiffModule,
        populations: MeasuredPopulations,
        rows: NDArray[np.int64],
        cells: SomeCells,
    ) -> LeftOut:
        """`rows` of the populations, left out of retrieval only; the latent space knows them."""
        retrieval = module.retrieval
        assert retrieval is not None  # of populations
        found = retrieval.leave_out(novelty, rows, with_genes=True)
        prior = left_out_prior(populations, retrieval, module.by_state, novelty, rows, module.device)
        known = retrieval.responses.conditions
        asked = known.take(rows)
        distance = retrieval.nearest(asked, asked.barred(known, novelty))
        along = _directions(module, novelty, found, _replicates(module))
        return cls(novelty, module, populations.take(rows), found, prior, distance, along, cells)

    @classmethod
    def of_unseen(cls, novelty: Novelty, space: Unseen, n: int, rng: np.random.Generator) -> LeftOut:
        """Left out of the latent space, too: `n` of them at most."""
        module, held_out = space.module, space.held_out
        assert module.retrieval is not None  # of populations
        some = held_out.take(np.sort(rng.permutation(len(held_out.table))[:n]))
        prior, found = predicted_prior(some, module.retrieval, module.by_state, module.device)
        distance = space.unit * module.retrieval.nearest(some.responses.conditions)
        factors = replicate_factors(space.known, int(_replicates(module).any(0).sum()))  # in this latent space
        along = _directions(module, novelty, found, factors)
        return cls(
            novelty, module, some, found, prior, distance, along, SomeCells.read(module, some, space.matrix, rng)
        )

    def noise(self, i: int) -> Tensor:
        """Sampling variance of the measured log fold changes of population `i`, `(n_genes,)`."""
        table = self.populations.table
        n_treated, n_controls = table.cells.count[i], table.match.groups.count[table.match.group[i]]
        return fold_noise(self.cells.treated[i], int(n_treated)) + fold_noise(self.cells.controls[i], int(n_controls))


def _replicates(module: PerturbDiffModule) -> NDArray[np.float64]:
    """Directions in which replicates differ in the latent space of the trained module, `(n_latent, n_factors)`."""
    return np.asarray(module.generator_ema.replicate_factors.cpu().numpy(), np.float64)


def _directions(
    module: PerturbDiffModule, novelty: Novelty, found: Retrieved, replicates: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Directions in which draws of what was `found` vary, and how far; as `replicates` where no others are known."""
    assert module.retrieval is not None
    doubt = module.retrieval.doubt.get(novelty)
    return (replicates, np.ones(len(found.variance))) if doubt is None else (doubt, np.sqrt(found.variance))


def fold_noise(counts: Tensor, n_cells: int) -> Tensor:
    """Sampling variance of the log of mean counts per 10,000, plus 1, over `n_cells` like these, `(n_genes,)`.

    Parameters
    ----------
    counts
        Of some of the cells, `(n, n_genes)`.
    n_cells
        Cells that the mean is over.
    """
    library = counts.sum(-1, keepdim=True)
    size = library.mean().clamp(min=1.0)
    mean = PER_CELL * counts.mean(0) / size
    apart = PER_CELL * counts / size - mean * library / size
    return apart.square().sum(0) / max(len(counts) - 1, 1) / n_cells / (1 + mean).square()
