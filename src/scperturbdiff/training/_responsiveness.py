"""Whether the cells of a population respond unevenly, told by populations that are left out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from scperturbdiff.diffusion import energy_distance, is_negative, relative_difference
from scperturbdiff.retrieval import draw_factors, factors_along, responsiveness_law
from scperturbdiff.training._populations import left_out_prior, useful_novelties
from scperturbdiff.training._settings import SETTINGS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from scperturbdiff.data import Groups
    from scperturbdiff.module import PerturbDiffModule
    from scperturbdiff.responses import MeasuredPopulations
    from scperturbdiff.retrieval import Novelty, Retrieval


def responsiveness_laws(
    populations: MeasuredPopulations, module: PerturbDiffModule, retrieval: Retrieval, seed: int
) -> dict[Novelty, NDArray[np.float64]]:
    """Laws of how strongly cells respond, for those ways of being new in which predictions are better with them.

    Cells of each population that is left out are predicted with the law of all others and with a response that all
    cells share. Energy distances to the measured cells must be smaller by more than a margin, beyond chance. A law is
    quantiles of the factor on the predicted response, `(n_quantiles,)`, of mean 1.

    Parameters
    ----------
    populations
        Populations.
    module
        Decodes; its ``by_state`` is used.
    retrieval
        Retrieval of `populations`.
    seed
        Of all choices.
    """
    table, rng = populations.table, np.random.default_rng(seed)
    enough = np.minimum(table.cells.count, table.match.groups.count[table.match.group]) >= SETTINGS.uneven_least
    rows = np.sort(rng.permutation(np.flatnonzero(enough))[: SETTINGS.uneven_populations])
    if len(rows) < SETTINGS.uneven_least:
        return {}

    def some(groups: Groups, number: int) -> NDArray[np.float64]:
        return populations.latent[rng.permutation(groups[number])[: SETTINGS.uneven_cells]].astype(np.float64)

    cells = [(some(table.match.groups, table.match.group[row]), some(table.cells, row)) for row in rows]
    targets = [module.expression(_tensor(real)) for _, real in cells]
    unchanged = [
        _distance(module.expression(_tensor(start)), to) for (start, _), to in zip(cells, targets, strict=True)
    ]
    least = SETTINGS.uneven_margin * float(np.mean(unchanged))  # where nothing is left to gain, shares mean nothing
    ways: list[Novelty] = [*useful_novelties(table, retrieval), "seen"]
    out: dict[Novelty, NDArray[np.float64]] = {}
    for novelty in ways:
        prior = left_out_prior(populations, retrieval, module.by_state, novelty, rows)
        moves = [prior.at(i).move(_tensor(start)[None])[0].numpy() - start for i, (start, _) in enumerate(cells)]
        shifts = [move.mean(0) for move in moves]
        factors = [factors_along(*pair, shift) for pair, shift in zip(cells, shifts, strict=True)]
        lengths = [float(np.linalg.norm(shift)) for shift in shifts]
        alike, uneven = np.zeros((2, len(rows)))
        for i, ((start, _), move) in enumerate(zip(cells, moves, strict=True)):
            others = [j for j in range(len(rows)) if j != i]
            law = responsiveness_law([factors[j] for j in others], [lengths[j] for j in others])
            latent, moved = _tensor(start), _tensor(start + move)
            factor = _tensor(draw_factors(law, len(start), rng))
            alike[i] = _distance(module.expression(moved), targets[i])
            uneven[i] = _distance(module.uneven_expression(latent, moved, factor), targets[i])
        change = relative_difference(torch.as_tensor(uneven), torch.as_tensor(alike), least)
        if is_negative(change + SETTINGS.uneven_margin):
            out[novelty] = responsiveness_law(factors, lengths)
    return out


def _distance(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(energy_distance(x[None], y[None]))


def _tensor(values: NDArray[np.float64]) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float32)
