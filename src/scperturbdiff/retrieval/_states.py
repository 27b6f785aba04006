"""States of cells: a population is a mixture of them, and each responds in its own way.

States are found among control cells. Treated cells are matched to them by unbalanced optimal transport, each state
moved by a shift of its own, so that a state may hold another share of treated cells than of controls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scperturbdiff.retrieval._covariance import squared_distances

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from scperturbdiff.retrieval._conditions import Floats
    from scperturbdiff.retrieval._settings import RetrievalSettings

CHUNK = 4096


@dataclass(frozen=True)
class States:
    """States of cells in the standardised latent space.

    Attributes
    ----------
    centres
        Their centres, `(n_states, n_latent)`.
    softness
        Variance per dimension with which cells belong to the states around them: states have no sharp borders.
    variance
        Mean variance of cells about their state, per dimension.
    """

    centres: Floats
    softness: float
    variance: float

    def __len__(self) -> int:
        return len(self.centres)

    @classmethod
    def fit(cls, cells: NDArray[np.floating], n_states: int, softness: float, seed: int = 0) -> States:
        """Find `n_states` among control cells `(n_cells, n_latent)`; `softness` in units of their variance."""
        from sklearn.cluster import KMeans  # scikit-learn takes long to import

        found = KMeans(n_states, n_init=4, random_state=seed % 2**32).fit(cells)
        variance = max(float(found.inertia_) / cells.size, 1e-6)
        return cls(found.cluster_centers_.astype(np.float64), softness * variance, variance)

    def shares(self, cells: NDArray[np.floating]) -> Floats:
        """Share of each state in each of `cells` `(n, n_latent)`; `(n, n_states)`, rows sum to one."""
        squared = squared_distances(np.asarray(cells, np.float64), self.centres)
        return _normalised(-squared / (2 * self.softness))


@dataclass(frozen=True)
class StateMoments:
    """States of several populations.

    Attributes
    ----------
    size
        Cells in each state of each population, `(n, n_states)`.
    effective
        The number of cells whose mean is as uncertain, `(n, n_states)`.
    mean
        Their mean, `(n, n_states, n_latent)`.
    variance
        Mean over dimensions of their variance, `(n, n_states)`.
    """

    size: Floats
    effective: Floats
    mean: Floats
    variance: Floats

    def take(self, rows: NDArray[np.int64]) -> StateMoments:
        """The populations of `rows`."""
        return StateMoments(self.size[rows], self.effective[rows], self.mean[rows], self.variance[rows])


def control_moments(states: States, cells: NDArray[np.floating], count: NDArray[np.integer]) -> StateMoments:
    """States of groups of control cells, one group of `count[g]` rows of `cells` after the other."""
    n = len(count)
    return _moments(states, cells, count, np.zeros((n, *states.centres.shape)), np.zeros((n, len(states))))


def match_states(
    states: States,
    cells: NDArray[np.floating],
    count: NDArray[np.integer],
    controls: StateMoments,
    settings: RetrievalSettings,
) -> StateMoments:
    """States of treated populations, matched to those of their controls.

    Cells are assigned by entropic optimal transport to the states as they have moved; the shares of states may differ
    from those of the controls at a cost. Shift and assignment are found in turn, from the shift of the population as a
    whole, towards which states of few cells are drawn.

    Parameters
    ----------
    states
        States.
    cells
        Treated cells, one population of `count[i]` rows after the other.
    count
        Their numbers, `(n,)`.
    controls
        States of the controls of each population.
    settings
        Steps, cost of another composition, weight of the whole population's shift.
    """
    share = controls.size / controls.size.sum(1, keepdims=True)
    control_mean = (share[..., None] * controls.mean).sum(1)
    starts = np.cumsum(count) - count
    whole = np.add.reduceat(np.asarray(cells, np.float64), starts, axis=0) / count[:, None] - control_mean
    shift, weight = np.repeat(whole[:, None], len(states), axis=1), np.zeros(share.shape)
    prior = settings.state_prior_cells
    for _ in range(settings.state_steps):
        found = _moments(states, cells, count, shift, weight)
        treated = np.maximum(found.size / count[:, None], 1e-9)
        weight = settings.state_balance * (np.log(np.maximum(share, 1e-9)) + weight - np.log(treated))
        size = found.size[..., None]
        shift = (size * (found.mean - controls.mean) + prior * whole[:, None]) / (size + prior)
    return _moments(states, cells, count, shift, weight)


def _moments(
    states: States, cells: NDArray[np.floating], count: NDArray[np.integer], shift: Floats, weight: Floats
) -> StateMoments:
    """Moments of populations whose states have moved by `shift` `(n, n_states, n_latent)`, log weights beside them."""
    n, (k, d) = len(count), states.centres.shape
    size, square_size, square = (np.zeros((n, k)) for _ in range(3))
    total = np.zeros((n, k, d))
    for rows, population in _chunks(count):
        part = np.asarray(cells[rows], np.float64)
        first, local = population[0], population - population[0]
        of = slice(first, population[-1] + 1)
        centres = (states.centres + shift[of])[local]
        share = _normalised(-_squared(part, centres) / (2 * states.softness) + weight[population])
        starts = np.flatnonzero(np.diff(local, prepend=-1))
        size[of] += np.add.reduceat(share, starts)
        square_size[of] += np.add.reduceat(share**2, starts)
        square[of] += np.add.reduceat(share * (part**2).sum(1, keepdims=True), starts)
        for start, stop, row in zip(starts, [*starts[1:], len(part)], np.unique(population), strict=True):
            total[row] += share[start:stop].T @ part[start:stop]
    safe = np.maximum(size, 1e-9)
    mean = total / safe[..., None]
    variance = np.maximum(square / safe - (mean**2).sum(-1), 0) / d
    return StateMoments(size, size**2 / np.maximum(square_size, 1e-12), mean, variance)


def _chunks(count: NDArray[np.integer]) -> Iterator[tuple[slice, NDArray[np.int64]]]:
    """Rows and their populations, some thousand at a time."""
    population = np.repeat(np.arange(len(count)), count)
    for start in range(0, len(population), CHUNK):
        rows = slice(start, min(start + CHUNK, len(population)))
        yield rows, population[rows]


def _squared(cells: NDArray[np.floating], centres: Floats) -> Floats:
    """Squared distances of cells `(n, d)` from their centres `(n or 1, n_states, d)`."""
    out: Floats = ((cells[:, None] - centres) ** 2).sum(-1)
    return out


def _normalised(logits: Floats) -> Floats:
    weight = np.exp(logits - logits.max(1, keepdims=True))
    out: Floats = weight / weight.sum(1, keepdims=True)
    return out
