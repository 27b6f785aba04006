"""Which control cells predicted cells start from."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from scperturbdiff.data.counts import log_normalize

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from scipy import sparse

N_CELLS = "n_cells"
"""Column of a table of wanted perturbations: cells per context and perturbation."""
ROUNDS = 30
"""Rounds of exchanges of cells; more take hardly anything off the distance to the mean of all."""
EXCHANGED = 50
"""One cell in this many is exchanged in a round, at most."""


def cells_wanted(n: Any, default: int) -> int:
    """A number of cells as given in an argument or in a table; missing: `default`."""
    if n is None or (isinstance(n, float) and np.isnan(n)):
        return default
    if int(n) != n or n < 1:
        raise ValueError(f"n_cells={n} must be a positive integer.")
    return int(n)


class ControlPool:
    """Control cells of one group.

    Parameters
    ----------
    counts
        Their counts, `(n_controls, n_genes)`.
    """

    def __init__(self, counts: sparse.csr_matrix) -> None:
        self.counts = counts

    def __len__(self) -> int:
        n: int = self.counts.shape[0]
        return n

    def choose(self, n_cells: int, rng: np.random.Generator) -> NDArray[np.intp]:
        """Positions of `n_cells` cells: every control equally often, in random order, and for the rest a fair share.

        That share is a random subset in which cells are exchanged until its mean expression is close to that of all
        controls: the mean of a few cells taken at random would be off by as much as many a response.
        """
        whole, rest = divmod(n_cells, len(self))
        chosen = [rng.permutation(len(self)) for _ in range(whole)]
        return np.concatenate([*chosen, self._representative(rest, rng)]) if rest else np.concatenate(chosen)

    def resample(self, n_cells: int, rng: np.random.Generator) -> NDArray[np.intp]:
        """Positions of `n_cells` cells drawn with replacement from controls that are drawn with replacement themselves.

        So do cells of one experiment and controls of another differ. Else the means of populations would differ by less
        than those of replicates do from the controls at hand.
        """
        another = rng.integers(len(self), size=len(self))
        return another[rng.integers(len(self), size=n_cells)]

    @cached_property
    def _standardised(self) -> tuple[sparse.csr_matrix, NDArray[np.float32], NDArray[np.float32]]:
        """Log-normalised expression in standard deviations, its mean over cells, squared distances of cells to that."""
        z = log_normalize(self.counts)
        mean = np.asarray(z.mean(0)).ravel()
        variance = np.asarray(z.multiply(z).mean(0)).ravel() - mean**2
        scale = np.where(variance > 1e-8, 1 / np.sqrt(np.maximum(variance, 1e-8)), 0)
        z.data *= scale[z.indices]
        mean *= scale
        distance = np.asarray(z.multiply(z).sum(1)).ravel() - 2 * (z @ mean) + mean @ mean
        return z, mean, distance

    def _representative(self, n: int, rng: np.random.Generator) -> NDArray[np.intp]:
        """Positions of `n` different cells whose mean expression is close to that of all, in random order."""
        z, mean, distance = self._standardised
        inside = np.zeros(len(self), bool)
        inside[rng.permutation(len(self))[:n]] = True
        off = np.asarray(z[inside].sum(0)).ravel() - n * mean
        k = max(1, min(n, len(self) - n) // EXCHANGED)
        for _ in range(ROUNDS):
            # squared length of `off` once a cell leaves or enters; cells exchanged together are nearly at right angles
            along = 2 * (z @ off)
            leaving = np.argsort(np.where(inside, distance - along, np.inf), kind="stable")[:k]
            entering = np.argsort(np.where(inside, np.inf, distance + along), kind="stable")[:k]
            moved = off + np.asarray(z[entering].sum(0) - z[leaving].sum(0)).ravel()
            if moved @ moved < off @ off:
                inside[leaving], inside[entering], off = False, True, moved
            elif k == 1:
                break
            else:
                k //= 2
        return rng.permutation(np.flatnonzero(inside))
