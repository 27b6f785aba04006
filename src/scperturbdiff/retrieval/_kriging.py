"""Kriging: which training conditions a new one draws on, and with what weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from scperturbdiff.retrieval._conditions import Conditions, Floats, Novelty
    from scperturbdiff.retrieval._kernel import ResponseKernel


class Neighborhood(NamedTuple):
    """The `k` training conditions most correlated with each of `q` new ones.

    Which of the new ones these are, the training conditions' numbers `(q, k)`, the covariance of their measured shifts
    `(q, k, k)` and that with the new condition's `(q, k)`, 0 for what may not be used.
    """

    rows: slice
    near: NDArray[np.int64]
    system: Floats
    to_known: Floats

    def weights(self, noise: float = 0.0) -> Floats:
        """Weights of the training conditions `(q, k)`, their measurements having so much more noise."""
        diagonal = np.arange(self.near.shape[1])
        system = self.system
        if noise:
            system = system.copy()
            system[:, diagonal, diagonal] += noise
        return np.asarray(np.linalg.solve(system, self.to_known[..., None])[..., 0], np.float64)

    def over_all(self, weights: Floats, n: int) -> Floats:
        """Weights of all `n` training conditions `(q, n)` from those of the nearest, 0 elsewhere."""
        out = np.zeros((len(weights), n))
        np.put_along_axis(out, self.near, weights, axis=1)
        return out


def neighborhoods(
    kernel: ResponseKernel,
    known: Conditions,
    noise: Floats,
    queries: Conditions,
    novelty: Novelty,
    leave: NDArray[np.int64] | None,
    n_neighbors: int,
    chunk: int = 128,
) -> Iterator[Neighborhood]:
    """Neighbourhoods of `queries`, `chunk` at a time.

    Parameters
    ----------
    kernel
        Covariance of responses.
    known
        Training conditions.
    noise
        Variance of their measurements in units of the kernel, `(n,)`.
    queries
        New conditions.
    novelty
        In which way they are new: what they may not use, see :meth:`Conditions.excluded`.
    leave
        A further training condition that each may not use, `(q,)`; `None` for none.
    n_neighbors
        Training conditions that each uses at most.
    chunk
        New conditions at a time.
    """
    k = min(n_neighbors, len(known))
    shared = kernel(known, known) if k == len(known) else None
    diagonal = np.arange(k)
    for start in range(0, len(queries), chunk):
        rows = slice(start, min(start + chunk, len(queries)))
        part = queries.take(rows)
        barred = part.excluded(known, novelty)
        if leave is not None:
            barred[np.arange(len(part)), leave[rows]] = True
        covariance = np.where(barred, 0.0, kernel(part, known))
        if shared is not None:
            near = np.tile(diagonal, (len(part), 1))
            system = np.repeat(shared[None], len(part), axis=0)
        else:
            near = np.argpartition(-np.abs(covariance), k - 1, axis=1)[:, :k]
            system = np.stack([kernel(known.take(n), known.take(n)) for n in near])
        # what may not be used gets endless noise, hence no weight
        system[:, diagonal, diagonal] += noise[near] + 1e9 * np.take_along_axis(barred, near, axis=1)
        yield Neighborhood(rows, near, system, np.take_along_axis(covariance, near, axis=1))
