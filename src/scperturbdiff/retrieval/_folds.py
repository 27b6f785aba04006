"""Evidence for following fold changes of genes rather than the decoded shift, and how far off these are."""

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
    constant, proportional
        Variance of the errors of predicted log fold changes, beyond that of draws by where their cells lie: a part that
        all genes share, and a part relative to the squared fold change.
    """

    distance: Floats
    agrees: Floats
    difference: Floats
    constant: float = 0.0
    proportional: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether left-out conditions show no errors beyond those that draws have already."""
        return self.constant + self.proportional <= 0

    def errors(self, fold: Floats, rng: np.random.Generator) -> Floats:
        """By how much predicted log fold changes `(n_genes,)` may be off, drawn for each gene by itself."""
        return rng.normal(size=fold.shape) * np.sqrt(self.constant + self.proportional * fold**2)

    def weight(self, distance: float, settings: RetrievalSettings) -> float:
        """Weight of fold changes in [0, 1] for a condition whose controls are `distance` from the nearest known.

        A regression in which conditions count as far as they were as new. One more says ``usual_weight``.
        """
        apart = np.log((1 + self.distance) / (1 + distance)) / settings.fold_width
        counts = np.exp(-0.5 * apart**2)
        prior = settings.fold_prior * self.difference.mean()
        said = counts @ self.agrees + prior * usual_weight(distance, settings)
        return float(np.clip(said / max(counts @ self.difference + prior, 1e-12), 0, 1))


def usual_weight(distance: float, settings: RetrievalSettings) -> float:
    """Weight of fold changes where nothing that was left out tells: from a half nearby to 1 far away.

    Nearby, both are about as good, and off for different reasons: their mean is better than either. Far from all cells
    that were seen treated the decoder extrapolates, and effects are carried over as fold changes, as a rule would.
    """
    squared = distance**2
    return 0.5 + 0.5 * squared / (squared + settings.fold_far**2)
