"""Short trainings of a VAE without the treated cells of some conditions: what it makes of cells it never saw.

A decoder that has seen the treated cells of a condition places them well, whatever is left out of retrieval later. What
it does with conditions that are new is told by one that has not seen them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import sparse

from scperturbdiff.data import Groups, iter_rows
from scperturbdiff.latent import train_shortly
from scperturbdiff.responses import SummedCounts, measure_populations
from scperturbdiff.retrieval import Retrieval, whole_perturbations
from scperturbdiff.seeds import derive_seed, seeded
from scperturbdiff.training._populations import have_features, known_otherwise
from scperturbdiff.training._safe import finite_vae
from scperturbdiff.training._settings import SETTINGS
from scperturbdiff.training._states import StateSearch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from scperturbdiff.data import PopulationTable
    from scperturbdiff.module import PerturbDiffModule
    from scperturbdiff.responses import MeasuredPopulations
    from scperturbdiff.retrieval import Novelty

    Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ShortTraining:
    """How a VAE is trained shortly: steps, cells a step, arguments of its plan."""

    n_steps: int = SETTINGS.unseen_steps
    batch_size: int = 128
    plan_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def beside(cls, epochs: int, n_cells: int, batch_size: int, plan_kwargs: Mapping[str, Any] | None) -> ShortTraining:
        """Beside a first stage of so many epochs: a quarter of its steps, at most."""
        quarter = math.ceil(epochs * max(1, n_cells // batch_size) / 4)
        return cls(min(quarter or SETTINGS.unseen_steps, SETTINGS.unseen_steps), batch_size, plan_kwargs or {})


@dataclass(frozen=True)
class Unseen:
    """A latent space, and populations that had no part in it.

    Attributes
    ----------
    module
        With a VAE of its own, and retrieval that knows the other populations only.
    known, held_out
        The other populations, and those that were left out.
    matrix
        Counts of the cells of both, `(n_cells, n_genes)`.
    unit
        What distances here are to be multiplied with to compare with those in the latent space of the trained module.
    """

    module: PerturbDiffModule
    known: MeasuredPopulations
    held_out: MeasuredPopulations
    matrix: sparse.csr_matrix
    unit: float


class UnseenPopulations:
    """Leaves conditions out of latent spaces that are trained shortly on some of the cells.

    Parameters
    ----------
    module
        The module, trained; it is not changed.
    populations
        All populations.
    matrix
        Counts of all cells, `(n_cells, n_genes)`, in memory or on disk.
    batch
        Batch codes of all cells, `(n_cells,)`.
    features
        Feature table of components.
    how
        How long to train.
    seed
        Of all choices.
    """

    def __init__(
        self,
        module: PerturbDiffModule,
        populations: MeasuredPopulations,
        matrix: Any,
        batch: NDArray[np.integer],
        features: NDArray[np.float64] | None,
        how: ShortTraining,
        seed: int,
    ) -> None:
        self.module, self.features, self.how, self.seed = module, features, how, seed
        self._all = populations, matrix, batch

    @cached_property
    def cells(self) -> tuple[PopulationTable, sparse.csr_matrix, NDArray[np.integer]]:
        """Some populations, counts of some of their cells, and the batches of these."""
        populations, matrix, batch = self._all
        rows = whole_perturbations(populations.responses.conditions, SETTINGS.unseen_populations, self.seed)
        rng = np.random.default_rng(self.seed)
        table, cells = excerpt(populations.table.take(rows), SETTINGS.unseen_cells, rng)
        blocks = [sparse.csr_matrix(block) for block in iter_rows(matrix, cells)]
        return table, sparse.vstack(blocks, format="csr"), batch[cells]

    def spaces(self, novelty: Novelty) -> Iterator[Unseen]:
        """Latent spaces without conditions that are new in this way; none where that leaves nothing."""
        for number, held_out in enumerate(self._folds(novelty)):
            with seeded(derive_seed(self.seed, "unseen", novelty, number), self.module.device):
                space = self._space(held_out)
            yield space

    def n_spaces(self, novelty: Novelty) -> int:
        """How many there are, at most."""
        return SETTINGS.unseen_folds if novelty == "context" else 1

    def _folds(self, novelty: Novelty) -> list[Ints]:
        """Populations that are left out together."""
        table, rng = self.cells[0], np.random.default_rng(derive_seed(self.seed, "unseen", novelty))
        if novelty == "context":
            contexts = rng.permutation(np.unique(table.context))
            size = max(1, len(contexts) // 3)
            folds = [np.isin(table.context, contexts[k * size : (k + 1) * size]) for k in range(self.n_spaces(novelty))]
        elif novelty == "pair":
            n = max(1, round(SETTINGS.unseen_share * len(np.unique(table.condition))))
            folds = [known_otherwise(table, n, rng, contexts=True)]
        else:
            described = np.flatnonzero(have_features(self.features))
            names = rng.permutation(np.intersect1d(table.component, described))
            some = names[: max(1, round(SETTINGS.unseen_share * len(names)))]
            folds = [np.asarray(np.isin(table.component, some).any(axis=1))]
        return [np.flatnonzero(fold) for fold in folds if fold.any() and not fold.all()]

    def _space(self, held_out: Ints) -> Unseen:
        table, matrix, batch = self.cells
        seen = np.setdiff1d(np.arange(len(batch)), np.concatenate([table.cells[row] for row in held_out]))
        module, how = self.module.with_new_vae(), self.how
        with finite_vae(module.vae, how.plan_kwargs.get("lr")):
            train_shortly(module.vae, matrix[seen], batch[seen], how.n_steps, how.batch_size, **how.plan_kwargs)
        counted = SummedCounts(table, matrix)
        latent = module.encode(counted.blocks())
        module.set_latent_scale(latent[torch.as_tensor(seen, device=latent.device)])
        measured = measure_populations(table, module.standardize(latent), counted, batch, module.shares)
        known = measured.take(np.setdiff1d(np.arange(len(table)), held_out))
        module.retrieval = Retrieval.fit(known.responses, self.features, module.retrieval_settings, self.seed)
        if self.module.by_state is not None:
            search = StateSearch(known, module.retrieval, module.expression, self.seed)
            module.by_state = search.fit_number(len(self.module.by_state.states))
        assert self.module.retrieval is not None  # of all populations
        unit = self.module.retrieval.median_distance / module.retrieval.median_distance
        return Unseen(module, known, measured.take(held_out), matrix, unit)


def excerpt(table: PopulationTable, n_cells: int, rng: np.random.Generator) -> tuple[PopulationTable, Ints]:
    """The same populations with fewer cells, about `n_cells` in all, and which cells these are, in order."""
    used, group = np.unique(table.match.group, return_inverse=True)
    most = max(SETTINGS.unseen_least, n_cells // max(len(table) + len(used), 1))
    treated, controls = (
        [groups.some(int(number), most, rng) for number in numbers]
        for groups, numbers in ((table.cells, range(len(table))), (table.match.groups, used))
    )
    cells = np.unique(np.concatenate([*treated, *controls]))
    of_cells, of_controls = (
        Groups.from_lists([np.searchsorted(cells, rows) for rows in part]) for part in (treated, controls)
    )
    match = replace(table.match, groups=of_controls, group=group.reshape(-1))
    return replace(table, cells=of_cells, match=match, controls=of_controls), cells
