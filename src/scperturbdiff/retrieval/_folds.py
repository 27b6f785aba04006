"""Evidence for following fold changes of genes rather than the decoded shift."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scperturbdiff.retrieval._conditions import Floats
    from scperturbdiff.retrieval._settings import RetrievalSettings


@dataclass(frozen=True)
class FoldEvidence:
    """What `n` training conditions that were left out say of fold changes.

    Attributes
    ----------
    distance
        Of their controls to the nearest training condition that was left, `(n,)`.
    agrees
        Inner product of the difference that fold changes make with the error of the decoded shift, `(n,)`.
    difference
        Squared length of that difference, `(n,)`.
    """

    distance: Floats
    agrees: Floats
    difference: Floats

    def weight(self, distance: float, settings: RetrievalSettings) -> float:
        """Weight of fold changes in [0, 1] for a condition whose controls are `distance` from the nearest known.

        A regression in which conditions count as far as they were as new. One more says 1: far from all that is known
        effects are carried over as fold changes, as a rule would.
        """
        apart = np.log((1 + self.distance) / (1 + distance)) / settings.fold_width
        counts = np.exp(-0.5 * apart**2)
        prior = settings.fold_prior * self.difference.mean()
        return float(np.clip((counts @ self.agrees + prior) / max(counts @ self.difference + prior, 1e-12), 0, 1))
