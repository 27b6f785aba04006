"""How many states of cells populations are split into: as many as conditions left out support."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from scperturbdiff.diffusion import energy_distance
from scperturbdiff.responses import ResponseSettings, response_of_states
from scperturbdiff.retrieval import Retrieval, StateRetrieval, States
from scperturbdiff.training._populations import left_out_prior
from scperturbdiff.training._settings import SETTINGS

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from scperturbdiff.responses import MeasuredPopulations
    from scperturbdiff.retrieval import Novelty

    Floats = NDArray[np.float64]


def choose_states(
    populations: MeasuredPopulations,
    retrieval: Retrieval,
    expression: Callable[[torch.Tensor], torch.Tensor],
    seed: int,
) -> StateRetrieval | None:
    """Retrieval by states, of as many as predict populations best that are left out; `None`: of one.

    Parameters
    ----------
    populations
        Populations.
    retrieval
        What their cells do as a whole.
    expression
        Expected log-normalised expression `(..., n_genes)` of latent vectors `(..., n_latent)`: where populations are
        compared, as what is better in the latent space may be worse in genes.
    seed
        Of all choices.
    """
    table = populations.table
    if len(np.unique(table.context)) < 2:
        return None
    cells = _sample_controls(populations, seed)
    tried = np.sort(np.random.default_rng(seed).permutation(len(table))[: SETTINGS.state_populations])
    before = left_out_distances(populations, retrieval, None, "context", tried, expression, seed)
    best, best_change = None, 0.0
    for n_states in retrieval.settings.n_states:
        if n_states * SETTINGS.cells_per_state > len(cells):
            break
        found = fit_states(populations, retrieval, cells, n_states, seed)
        after = left_out_distances(populations, retrieval, found, "context", tried, expression, seed)
        change = (after - before) / np.maximum(before, max(0.25 * before.mean(), 1e-6))
        import os

        if os.environ.get("DBG"):
            print(
                "K",
                n_states,
                "before",
                before.round(3)[:8],
                "after",
                after.round(3)[:8],
                "change",
                change.mean().round(3),
            )
        if os.environ.get("FORCEK"):
            best = found if str(n_states) == os.environ["FORCEK"] else best
            continue
        doubt = change.std(ddof=1) / np.sqrt(len(change))
        if change.mean() + doubt < 0 and change.mean() < min(best_change - SETTINGS.state_step, -SETTINGS.state_margin):
            best, best_change = found, float(change.mean())
    return best


def fit_states(
    populations: MeasuredPopulations, whole: Retrieval, cells: NDArray[np.float32], n_states: int, seed: int
) -> StateRetrieval:
    """Retrieval by `n_states` states found among control `cells` `(n, n_latent)`."""
    states = States.fit(cells, n_states, whole.settings.state_softness, seed)
    responses = response_of_states(populations, states, whole.settings, ResponseSettings())
    return StateRetrieval(states, Retrieval.fit(responses, whole.features, whole.settings, seed))


def _sample_controls(populations: MeasuredPopulations, seed: int) -> NDArray[np.float32]:
    """Latent vectors of control cells, equally many of each group as far as there are."""
    rng, groups = np.random.default_rng(seed), populations.table.match.groups
    most = -(-SETTINGS.state_cells // len(groups))
    rows = [rng.permutation(groups[g])[:most] for g in range(len(groups))]
    return populations.latent[np.unique(np.concatenate(rows))]


def left_out_distances(
    populations: MeasuredPopulations,
    retrieval: Retrieval,
    by_state: StateRetrieval | None,
    novelty: Novelty,
    rows: NDArray[np.int64],
    expression: Callable[[torch.Tensor], torch.Tensor],
    seed: int,
) -> Floats:
    """Energy distance of each of `rows` to what is retrieved when it is left out, `(n,)`."""
    table = populations.table.take(rows)
    prior = left_out_prior(populations, retrieval, by_state, novelty, rows)
    out = np.zeros(len(rows))
    for i in range(len(rows)):
        rng = np.random.default_rng((seed, int(rows[i])))
        some = [
            torch.as_tensor(populations.latent[rng.permutation(cells)[: SETTINGS.state_cells_scored]])
            for cells in (table.match.groups[table.match.group[i]], table.cells[i])
        ]
        start, real = (part.float()[None] for part in some)
        moved = prior.at(i).move(start)
        out[i] = float(energy_distance(expression(moved), expression(real)))
    return out
