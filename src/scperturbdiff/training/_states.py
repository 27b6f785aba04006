"""How many states of cells populations are split into: as many as what is left out supports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from scperturbdiff.diffusion import energy_distance
from scperturbdiff.priors import make_prior
from scperturbdiff.responses import ResponseSettings, response_of_states
from scperturbdiff.retrieval import (
    Conditions,
    Responses,
    Retrieval,
    Retrieved,
    StateRetrieval,
    States,
    control_moments,
    match_states,
    state_responses,
)
from scperturbdiff.training._populations import left_out_prior
from scperturbdiff.training._settings import SETTINGS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from scperturbdiff.diffusion import Prior
    from scperturbdiff.responses import MeasuredPopulations

    Floats = NDArray[np.float64]


N_MARKERS = 10
"""Genes that are named for each state."""


def describe_states(
    by_state: StateRetrieval,
    populations: MeasuredPopulations,
    expression: Callable[[torch.Tensor], torch.Tensor],
    genes: Sequence[str],
    contexts: Sequence[str],
) -> pd.DataFrame:
    """What the states of cells are.

    Parameters
    ----------
    by_state
        The states.
    populations
        Populations.
    expression
        Expected log-normalised expression of latent vectors.
    genes
        Names of genes, in order.
    contexts
        Context of each population.

    Returns
    -------
    One row a state, `"1"`, `"2"` and so on: `markers`, the genes whose expected expression is furthest above the mean
    of the other states; `share` of the control cells, and ``share <context>`` of those of each context.
    """
    states, table = by_state.states, populations.table
    groups = table.match.groups
    size = control_moments(states, populations.latent[groups.rows], groups.count).size
    decoded = expression(torch.as_tensor(states.centres, dtype=torch.float32)).cpu().numpy()
    above = decoded - (decoded.sum(0) - decoded) / max(len(states) - 1, 1)
    names = np.asarray(genes)
    out = pd.DataFrame(index=pd.Index([str(k + 1) for k in range(len(states))], name="state"))
    out["markers"] = [", ".join(names[np.argsort(-row)[:N_MARKERS]]) for row in above]
    out["share"] = size.sum(0) / size.sum()
    for context in dict.fromkeys(contexts):
        used = np.unique(table.match.group[np.asarray(contexts) == context])
        out[f"share {context}"] = size[used].sum(0) / size[used].sum()
    return out


@dataclass(frozen=True)
class StateSearch:
    """Chooses the number of states of cells.

    Attributes
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

    populations: MeasuredPopulations
    retrieval: Retrieval
    expression: Callable[[torch.Tensor], torch.Tensor]
    seed: int

    def choose(self) -> StateRetrieval | None:
        """Retrieval by states, of as many as predict populations best that are left out; `None`: of one.

        With several contexts each is left out in turn. With one, the cells are: half of them say what each state does,
        the others whether that is more than what all do.
        """
        table = self.populations.table
        several = len(np.unique(table.context)) > 1
        distances = self._without_context if several else self._without_half
        order = np.random.default_rng(self.seed).permutation(len(table))
        rows, cells = np.sort(order[: SETTINGS.state_populations]), self._some_controls()
        before = distances(None, rows)
        best, best_change = None, 0.0
        for n_states in self.retrieval.settings.n_states:
            if n_states * SETTINGS.cells_per_state > len(cells):
                break
            states = States.fit(cells, n_states, self.retrieval.settings.state_softness, self.seed)
            found = self.fit(states, draft=True)
            change = (distances(found, rows) - before) / np.maximum(before, max(0.25 * before.mean(), 1e-6))
            doubt = change.std(ddof=1) / np.sqrt(len(change)) if len(change) > 1 else 0.0
            needed = max(SETTINGS.state_margin, float(doubt), SETTINGS.state_step - best_change)
            if change.mean() < -needed:
                best, best_change = found, float(change.mean())
        return None if best is None else self.fit(best.states)

    def fit(self, states: States, *, draft: bool = False) -> StateRetrieval:
        """Retrieval by these states; a `draft` only of new contexts."""
        whole = self.retrieval
        responses = response_of_states(self.populations, states, whole.settings, ResponseSettings())
        return StateRetrieval(states, Retrieval.fit(responses, whole.features, whole.settings, self.seed, draft=draft))

    def fit_number(self, n_states: int) -> StateRetrieval:
        """Retrieval by so many states, untested."""
        softness = self.retrieval.settings.state_softness
        return self.fit(States.fit(self._some_controls(), n_states, softness, self.seed))

    def _some_controls(self) -> NDArray[np.float32]:
        """Latent vectors of control cells, equally many of each group as far as there are."""
        rng, groups = np.random.default_rng(self.seed), self.populations.table.match.groups
        most = -(-SETTINGS.state_cells // len(groups))
        rows = [groups.some(g, most, rng) for g in range(len(groups))]
        return self.populations.latent[np.unique(np.concatenate(rows))]

    def _without_context(self, by_state: StateRetrieval | None, rows: NDArray[np.int64]) -> Floats:
        """Energy distance of each of `rows` to what is retrieved without its context, `(n,)`."""
        table = self.populations.table.take(rows)
        prior = left_out_prior(self.populations, self.retrieval, by_state, "context", rows)
        return np.array(
            [
                self._distance(prior.at(i), table.match.groups[table.match.group[i]], table.cells[i], int(row))
                for i, row in enumerate(rows)
            ]
        )

    def _without_half(self, by_state: StateRetrieval | None, rows: NDArray[np.int64]) -> Floats:
        """Energy distance of half of the cells to what the other half says, of each of `rows` `(n * n_splits,)`."""
        table = self.populations.table.take(rows)
        out = []
        for i, row in enumerate(rows):
            for split in range(SETTINGS.state_splits):
                rng = np.random.default_rng((self.seed, int(row), split))
                (controls, others), (treated, real) = (
                    np.array_split(rng.permutation(cells), 2)
                    for cells in (table.match.groups[table.match.group[i]], table.cells[i])
                )
                if min(map(len, (controls, others, treated, real))) > 1:
                    out.append(self._distance(self._half_prior(by_state, controls, treated), others, real, int(row)))
        return np.array(out or [0.0])

    def _half_prior(
        self, by_state: StateRetrieval | None, controls: NDArray[np.int64], treated: NDArray[np.int64]
    ) -> Prior:
        """What these cells did."""
        latent, settings = self.populations.latent, self.retrieval.settings
        mean = latent[controls].mean(0, dtype=np.float64)
        nothing = Retrieved.nothing(1, latent.shape[1])
        nothing.shift[0] = latent[treated].mean(0, dtype=np.float64) - mean
        one = Conditions(mean[None], np.zeros((1, 1), np.int64), np.zeros((1, 1)), np.zeros(1, np.int64), np.zeros(1))
        if by_state is None:
            return make_prior(nothing, one)
        states = by_state.states
        start = control_moments(states, latent[controls], np.array([len(controls)]))
        moved = match_states(states, latent[treated], np.array([len(treated)]), start, settings)
        found: Responses = state_responses(states, one, start, moved, ResponseSettings().pseudo_cells)
        each = Retrieved.nothing(len(states), latent.shape[1])
        each.shift[:] = found.shift
        return make_prior(nothing, one, (states, found.conditions, each))

    def _distance(self, prior: Prior, controls: NDArray[np.int64], treated: NDArray[np.int64], row: int) -> float:
        """Energy distance of `treated` to `controls` that are moved."""
        rng, latent = np.random.default_rng((self.seed, row)), self.populations.latent
        start, real = (
            torch.as_tensor(latent[rng.permutation(cells)[: SETTINGS.state_cells_scored]])[None]
            for cells in (controls, treated)
        )
        return float(energy_distance(self.expression(prior.move(start)), self.expression(real)))
