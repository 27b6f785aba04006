"""What retrieval is given and what it gives: measured and retrieved responses."""

from __future__ import annotations

from dataclasses import dataclass, field
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
    fold
        Log fold change per gene of mean counts per 10,000, after adding 1, `(n, n_genes)`. Default: 0.
    within
        Variance of control cells around the mean of their group, per dimension, pooled: over the number of cells it is
        the sampling variance of such a mean.
    """

    conditions: Conditions
    shift: Floats
    spread: Floats
    library: Floats
    residual: NDArray[np.float16]
    fold: NDArray[np.float16] = field(default_factory=lambda: np.zeros((0, 0), np.float16))
    within: float = 1.0

    def __post_init__(self) -> None:
        if not self.fold.size:
            object.__setattr__(self, "fold", np.zeros_like(self.residual))

    def __len__(self) -> int:
        return len(self.shift)

    def take(self, rows: NDArray[np.int64]) -> Responses:
        """The populations of `rows`."""
        conditions, residual, fold = self.conditions.take(rows), self.residual[rows], self.fold[rows]
        shift, spread, library = self.shift[rows], self.spread[rows], self.library[rows]
        return Responses(conditions, shift, spread, library, residual, fold, self.within)


@dataclass(frozen=True)
class Retrieved:
    """Responses to expect of `n` conditions; fields as in :class:`Responses`.

    Attributes
    ----------
    shift, spread, library, residual, fold
        What to expect; `residual` and `fold` have no genes where they were not asked for.
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
    fold: Floats
    variance: Floats
    prior_variance: Floats
    novelty: list[Novelty]

    @classmethod
    def nothing(cls, n: int, n_latent: int, n_genes: int = 0, novelty: Novelty = "seen") -> Retrieved:
        """No response of `n` conditions."""
        numbers = (np.zeros(n) for _ in range(4))
        shift, residual, fold = np.zeros((n, n_latent)), np.zeros((n, n_genes)), np.zeros((n, n_genes))
        spread, library, variance, prior = numbers
        return cls(shift, spread, library, residual, fold, variance, prior, [novelty] * n)

    def put(self, rows: NDArray[np.int64] | slice, part: Retrieved) -> None:
        """Fill in `rows` from `part`."""
        for name in ("shift", "spread", "library", "residual", "fold", "variance", "prior_variance"):
            getattr(self, name)[rows] = getattr(part, name)
        for row, novelty in zip(np.arange(len(self.novelty))[rows], part.novelty, strict=True):
            self.novelty[row] = novelty
