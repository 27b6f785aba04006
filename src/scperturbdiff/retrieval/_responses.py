"""What retrieval is given and what it gives: measured and retrieved responses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from scperturbdiff.retrieval._conditions import Conditions, Floats, Novelty


@dataclass(frozen=True)
class Responses:
    """Measured responses of `n` populations, against their matched controls; standardised latent space.

    Attributes
    ----------
    conditions
        What was done to which controls.
    shift
        Mean of the treated minus mean of the control cells, `(n, n_latent)`.
    spread
        Log ratio of the spread of cells (standard deviation over all dimensions) to that of the controls, `(n,)`.
    library
        Log ratio of mean library sizes to those of the controls, `(n,)`.
    residual
        Log ratio per gene of measured to decoded counts, less that of the controls, `(n, n_genes)`.
    """

    conditions: Conditions
    shift: Floats
    spread: Floats
    library: Floats
    residual: NDArray[np.float16]

    def __len__(self) -> int:
        return len(self.shift)

    def take(self, rows: NDArray[np.int64]) -> Responses:
        """The populations of `rows`."""
        conditions, residual = self.conditions.take(rows), self.residual[rows]
        return Responses(conditions, self.shift[rows], self.spread[rows], self.library[rows], residual)


@dataclass(frozen=True)
class Retrieved:
    """Responses to expect of `n` conditions; fields as in :class:`Responses`.

    Attributes
    ----------
    shift, spread, library, residual
        What to expect; `residual` has no genes where training conditions are left out.
    variance
        Of the shift, per dimension, `(n,)`.
    prior_variance
        The same before any training condition is looked at, `(n,)`.
    novelty
        In which way each condition was taken to be new.
    """

    shift: Floats
    spread: Floats
    library: Floats
    residual: Floats
    variance: Floats
    prior_variance: Floats
    novelty: list[Novelty]

    @classmethod
    def nothing(cls, n: int, n_latent: int, n_genes: int = 0, novelty: Novelty = "seen") -> Retrieved:
        """No response of `n` conditions."""
        shift, residual = np.zeros((n, n_latent)), np.zeros((n, n_genes))
        return cls(shift, np.zeros(n), np.zeros(n), residual, np.zeros(n), np.zeros(n), [novelty] * n)

    def put(self, rows: NDArray[np.int64] | slice, part: Retrieved) -> None:
        """Fill in `rows` from `part`."""
        for name in ("shift", "spread", "library", "residual", "variance", "prior_variance"):
            getattr(self, name)[rows] = getattr(part, name)
        for row, novelty in zip(np.arange(len(self.novelty))[rows], part.novelty, strict=True):
            self.novelty[row] = novelty
