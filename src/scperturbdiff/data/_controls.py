"""Which control cells predicted cells start from."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from scperturbdiff.data._counts import log_normalize

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from scipy import sparse


N_CELLS = "n_cells"
"""Column of a table of wanted perturbations: cells per context and perturbation."""
ROUNDS = 30
"""Rounds of exchanges of cells."""
EXCHANGED = 50
"""One cell in this many is exchanged in a round, at most."""
CANDIDATES, CANDIDATES_PER_CELL = 1000, 3
"""Of larger groups so many controls are looked at, taken at random, or so many for each cell wanted."""


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
    def _standardised(self) -> tuple[sparse.csr_matrix, NDArray[np.float64], NDArray[np.float64]]:
        """Log-normalised expression in standard deviations, its mean over cells, squared distances of cells to that."""
        z = log_normalize(self.counts)
        mean = _sum_of_cells(z) / len(self)
        squares = np.bincount(z.indices, np.square(z.data, dtype=np.float64), minlength=z.shape[1])
        variance = squares / len(self) - mean**2
        scale = np.where(variance > 1e-8, 1 / np.sqrt(np.maximum(variance, 1e-8)), 0)
        z.data *= scale[z.indices].astype(np.float32)
        mean *= scale
        distance = np.asarray(z.multiply(z).sum(1)).ravel() - 2 * (z @ mean) + mean @ mean
        return z, mean, distance

    def _representative(self, n: int, rng: np.random.Generator) -> NDArray[np.intp]:
        """Positions of `n` different cells whose mean expression is close to that of all, in random order."""
        z, mean, distance = self._standardised
        candidates = rng.permutation(len(self))[: max(CANDIDATES, CANDIDATES_PER_CELL * n)]
        z, distance = z[candidates], distance[candidates]
        inside = np.arange(len(candidates)) < n
        off = _sum_of_cells(z[:n]) - n * mean
        k = max(1, min(n, len(candidates) - n) // EXCHANGED)
        for _ in range(ROUNDS):
            # squared length of `off` once a cell leaves or enters; cells exchanged together are nearly at right angles
            along = 2 * (z @ off.astype(np.float32))
            leaving = np.argsort(np.where(inside, distance - along, np.inf), kind="stable")[:k]
            entering = np.argsort(np.where(inside, np.inf, distance + along), kind="stable")[:k]
            moved = off + _sum_of_cells(z[entering]) - _sum_of_cells(z[leaving])
            if moved @ moved < off @ off:
                inside[leaving], inside[entering], off = False, True, moved
            elif k == 1:
                break
            else:
                k //= 2
        return rng.permutation(np.sort(candidates[inside]))


def _sum_of_cells(cells: sparse.csr_matrix) -> NDArray[np.float64]:
    """Sum over cells, `(n_genes,)`; in double precision, which a sparse matrix of single precision does not use."""
    return np.asarray(np.bincount(cells.indices, cells.data, minlength=cells.shape[1]), dtype=np.float64)
