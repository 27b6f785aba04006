"""The target's own gene: in genetic screens the perturbed gene itself falls, or rises with activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scperturbdiff.retrieval._settings import RetrievalSettings

if TYPE_CHECKING:
    from scperturbdiff.retrieval._conditions import Floats

CLEAR = 3.0
"""Standard errors from no change at which a target shows that its gene changes."""
STEPS = 50


@dataclass(frozen=True)
class OwnGene:
    """By how much the gene changes that a perturbation is named after, learned from training perturbations.

    Attributes
    ----------
    fold
        Mean log fold change (natural logarithm) of counts over targets.
    spread
        Standard deviation of it between targets, sampling noise taken off.
    n_targets
        Training targets whose gene is measured with counts enough to show a change by half.
    n_clear
        Those of them whose gene clearly changes in the direction of most.
    used
        Whether that is clear enough for targets that training never saw.
    """

    fold: float = 0.0
    spread: float = 0.0
    n_targets: int = 0
    n_clear: int = 0
    used: bool = False

    @classmethod
    def of(cls, fold: Floats, error: Floats, settings: RetrievalSettings = RetrievalSettings()) -> OwnGene:
        r"""Learn it from targets whose gene is measured.

        Folds are drawn from :math:`\mathcal N(\mu, \tau^2)` and measured with their errors; both moments are those of
        largest likelihood (a random-effects mean). It is used if there are `settings.own_gene_min` targets and
        `settings.own_gene_share` of them clearly change in the same direction. Targets whose error is too large to show
        a change by half say nothing either way.

        Parameters
        ----------
        fold, error
            Log fold change of each target's own gene and its standard error, `(n_targets,)`; NaN where not measured.
        settings
            Constants.
        """
        shows = np.isfinite(fold) & np.isfinite(error)
        shows[shows] = CLEAR * error[shows] < np.log(2)
        fold, error = fold[shows], error[shows]
        n = len(fold)
        if not n:
            return cls()
        mean, spread = random_effects(fold, error)
        clear = np.abs(fold) > CLEAR * error
        falls, rises = int((clear & (fold < 0)).sum()), int((clear & (fold > 0)).sum())
        n_clear, agrees = max(falls, rises), (mean < 0) == (falls > rises)
        used = agrees and n >= settings.own_gene_min and n_clear >= settings.own_gene_share * n
        return cls(mean, spread, n, n_clear, used)

    def __str__(self) -> str:
        """What was learned, in a sentence; empty where no target's gene is measured."""
        if not self.n_targets:
            return ""
        of = f"{self.n_targets} target{'s' * (self.n_targets > 1)} whose gene is measured"
        if not self.used:
            return (
                f"The target's own gene clearly changes in the same direction in {self.n_clear} of {of}: not enough to "
                "expect it of others."
            )
        doubling = 1 / np.log(2)
        way = "falls" if self.fold < 0 else "rises"
        return (
            f"The target's own gene {way} clearly in {self.n_clear} of {of} (log2 fold change "
            f"{self.fold * doubling:.1f}, s.d. between targets {self.spread * doubling:.1f}), and so it does in "
            "predictions of targets never seen."
        )


def random_effects(value: Floats, error: Floats) -> tuple[float, float]:
    """Mean and standard deviation of what is measured as `value` with standard errors `error`, `(n,)` each.

    Those of largest likelihood under Gaussian laws, by expectation-maximisation.
    """
    mean, variance = float(value.mean()), float(value.var())
    noise = np.maximum(error**2, 1e-12)
    for _ in range(STEPS):
        weight = 1 / (variance + noise)
        mean = float((weight * value).sum() / weight.sum())
        posterior = mean + variance * weight * (value - mean)
        variance = float(((posterior - mean) ** 2 + variance * noise * weight).mean())
    return mean, float(np.sqrt(variance))
