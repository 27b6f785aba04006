"""How strongly doses act: responses grow with the dose while their direction hardly changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from scperturbdiff.retrieval._settings import RetrievalSettings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from scperturbdiff.retrieval._conditions import Conditions, Floats

FIT_STEPS = 50


@dataclass(frozen=True)
class DoseStrength:
    """Strength of the response at some doses, relative to the average; in between it is linear in the log dose.

    Beyond the measured doses it stays as it is at the last one.

    Attributes
    ----------
    doses
        Log-scaled doses in ascending order, `(n_levels,)`.
    strength
        Length of the response relative to the average, positive, `(n_levels,)`.
    """

    doses: Floats = field(default_factory=lambda: np.zeros(1))
    strength: Floats = field(default_factory=lambda: np.ones(1))

    def __call__(self, dose: Floats) -> Floats:
        """Strength at log-scaled doses of any shape."""
        out: Floats = np.interp(dose, self.doses, self.strength)
        return out

    @classmethod
    def of(
        cls, conditions: Conditions, shifts: Floats, settings: RetrievalSettings = RetrievalSettings()
    ) -> DoseStrength:
        r"""Estimate it from populations of one component.

        Mean squares of shifts, less their sampling noise, are fitted by :math:`A_p B_d`, `p` the perturbation in its
        context and `d` the dose, so that a strong perturbation given at a low dose does not make that dose look strong.
        """
        single = np.flatnonzero((conditions.component >= 0).sum(axis=1) == 1)
        column = (conditions.component[single] >= 0).argmax(axis=1)
        dose = conditions.dose[single, column]
        if np.unique(dose).size < 2:
            return cls()
        doses, level = _levels(dose, settings.max_dose_levels)
        keys = np.column_stack([conditions.context[single], conditions.component[single].max(axis=1)])
        perturbation = np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1)
        power = np.maximum((shifts[single] ** 2).mean(axis=1) - conditions.noise[single], 0)
        if not power.any():
            return cls()
        count, total = (np.zeros((perturbation.max() + 1, len(doses))) for _ in range(2))
        np.add.at(count, (perturbation, level), 1)
        np.add.at(total, (perturbation, level), power / power.mean())
        by_dose = np.ones(len(doses))
        for _ in range(FIT_STEPS):
            by_perturbation = total.sum(axis=1) / (count @ by_dose)
            by_dose = (total.sum(axis=0) + settings.dose_prior_weight) / (
                by_perturbation @ count + settings.dose_prior_weight
            )
        by_dose /= (by_dose * count.sum(axis=0)).sum() / count.sum()
        return cls(doses, np.sqrt(by_dose))


def _levels(dose: Floats, max_levels: int) -> tuple[Floats, NDArray[np.int64]]:
    """Doses to estimate the strength at, `(n_levels,)`, and which of them each of `dose` belongs to."""
    values, level = np.unique(dose, return_inverse=True)
    level = level.reshape(-1)
    if len(values) > max_levels:
        edges = np.unique(np.quantile(dose, np.linspace(0, 1, max_levels + 1)[1:-1]))
        level = np.unique(np.searchsorted(edges, dose), return_inverse=True)[1].reshape(-1)
        values = np.bincount(level, dose) / np.bincount(level)
    return values, level.astype(np.int64)
