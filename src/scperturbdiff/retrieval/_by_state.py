"""Retrieval state by state: what the cells of a state did elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from scperturbdiff.retrieval._conditions import Conditions
from scperturbdiff.retrieval._responses import Responses
from scperturbdiff.retrieval._retrieval import KINDS, Retrieval
from scperturbdiff.retrieval._saved import VERSION, from_saved
from scperturbdiff.retrieval._states import StateMoments, States
from scperturbdiff.storage import to_state

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from scperturbdiff.retrieval._conditions import Floats
    from scperturbdiff.retrieval._responses import Retrieved

MIN_CELLS = 0.1
"""Fewer cells of a state say as little as these."""


@dataclass(frozen=True)
class StateRetrieval:
    """Retrieval whose conditions are states of cells in populations, `n_states` rows for each population in turn.

    Attributes
    ----------
    states
        The states.
    retrieval
        Retrieval of their shifts and spreads.
    """

    states: States
    retrieval: Retrieval

    def conditions(self, asked: Conditions, cells: NDArray[np.floating]) -> Conditions:
        """Conditions of the states of one population, of its control cells `(n, n_latent)`."""
        share = self.states.shares(cells)
        size = share.sum(0)
        mean = share.T @ cells.astype(np.float64) / np.maximum(size, 1e-12)[:, None]
        noise = self.states.variance / np.maximum(size, MIN_CELLS)
        return by_state(asked, mean[None], noise[None], noise[None], size[None] / size.sum())

    def predict(self, asked: Conditions, cells: NDArray[np.floating]) -> tuple[Conditions, Retrieved]:
        """Response of each state of one population to expect, and what it was retrieved for."""
        conditions = self.conditions(asked, cells)
        return conditions, self.retrieval.predict(conditions)

    def rows(self, populations: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of the states of `populations`, those of one after those of another."""
        k = len(self.states)
        return (populations[:, None] * k + np.arange(k)).reshape(-1)

    def with_features(self, features: Floats | None) -> StateRetrieval:
        """The same with the feature table of further components."""
        return replace(self, retrieval=self.retrieval.with_features(features))

    def state(self) -> dict[str, Any]:
        """Tensors, numbers and text for saving, with the version of their format."""
        return {"version": VERSION, "retrieval": to_state(self)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], n_latent: int | None = None) -> StateRetrieval:
        """What :meth:`state` gave; as :meth:`Retrieval.from_state`."""
        kinds = KINDS | {"StateRetrieval": StateRetrieval, "States": States}
        found: StateRetrieval = from_saved(state, kinds, n_latent, 0)  # genes are retrieved for all states together
        return found


def by_state(conditions: Conditions, mean: Floats, noise: Floats, control_noise: Floats, mass: Floats) -> Conditions:
    """Conditions of the states of populations, `(n * n_states)` rows.

    Parameters
    ----------
    conditions
        The `n` populations.
    mean
        Means of control cells, `(n, n_states, n_latent)`.
    noise, control_noise, mass
        Fields of :class:`Conditions`, `(n, n_states)`.
    """
    n, k = mass.shape
    rows = np.repeat(np.arange(n), k)
    return Conditions(
        mean.reshape(n * k, -1),
        conditions.component[rows],
        conditions.dose[rows],
        conditions.context[rows],
        noise.reshape(-1),
        rows,
        np.tile(np.arange(k), n),
        mass.reshape(-1),
        control_noise.reshape(-1),
    )


def state_responses(
    states: States, conditions: Conditions, controls: StateMoments, treated: StateMoments, pseudo_cells: float
) -> Responses:
    """What each state of each population did; without libraries and residuals.

    Parameters
    ----------
    states
        The states.
    conditions
        The populations.
    controls, treated
        Their matched controls and treated cells.
    pseudo_cells
        Cells with the controls' spread that are added to each state before spreads are compared.
    """
    effective = [1 / np.maximum(moments.effective, MIN_CELLS) for moments in (controls, treated)]
    control_noise, treated_noise = (states.variance * part for part in effective)
    mass = controls.size / controls.size.sum(1, keepdims=True)
    few, size = pseudo_cells, treated.effective
    before = (controls.effective * controls.variance + few * states.variance) / (controls.effective + few)
    after = (size * treated.variance + few * before) / (size + few)
    spread = (0.5 * np.log(np.maximum(after, 1e-12) / np.maximum(before, 1e-12))).reshape(-1)
    shift = (treated.mean - controls.mean).reshape(len(spread), -1)
    nothing = np.zeros(len(spread)), np.zeros((len(spread), 0), np.float16)
    noise = control_noise + treated_noise
    return Responses(by_state(conditions, controls.mean, noise, control_noise, mass), shift, spread, *nothing)
