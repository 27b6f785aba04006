"""Rules that predict unseen perturbations from features of their components."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scperturbdiff.data import FeatureTable, did_you_mean, preview
from scperturbdiff.evaluation.baselines._base import Baseline, Change, Request

if TYPE_CHECKING:
    import pandas as pd

    from scperturbdiff.evaluation.baselines._profiles import Floats


class _FromFeatures(Baseline):
    """Shift as a function of features, learned within the context, or over all contexts where it has no treated cell.

    A combination has the sum of the features of its components. The perturbation that is predicted is left out of what
    the rule learns from, even where it was trained on.
    """

    def __init__(self, features: pd.DataFrame) -> None:
        self.features = FeatureTable.parse(features)

    def _vector(self, label: str) -> Floats | None:
        rows = self.features.rows(self.labels_.components(label)).astype(np.float64)
        return None if np.isnan(rows).any() else rows.sum(axis=0)

    def _examples(self, request: Request) -> tuple[Floats, Floats, Floats]:
        """Features and shifts of training perturbations and the features asked for; features are standardised."""
        asked = self._vector(request.label)
        if asked is None:
            absent = [part for part in request.components if part not in self.features.names]
            hint = did_you_mean(absent[0], self.features.names)
            raise ValueError(f"{type(self).__name__}: features have no row for {preview(absent)}.{hint}")
        profiles = self.profiles_
        contexts = [request.context] if request.context in profiles.treated else list(profiles.treated)
        vectors, shifts = [], []
        for label in sorted({label for context in contexts for label in profiles.treated[context]}):
            vector = self._vector(label)
            if vector is None or label == request.label:
                continue
            measured = [context for context in contexts if label in profiles.treated[context]]
            vectors.append(vector)
            shifts.append(np.mean([profiles.shift(context, label, request.doses) for context in measured], axis=0))
        if len(vectors) < 2:
            raise ValueError(
                f"{type(self).__name__} has {len(vectors)} training perturbations with features to learn "
                f"{request.label!r} from; it needs 2. Perturbations in training: {preview(profiles.labels, 30)}."
            )
        x = np.array(vectors)
        centre, spread = x.mean(axis=0), x.std(axis=0)
        scale = np.where(spread > 0, spread, 1.0) * np.sqrt(x.shape[1])
        return (x - centre) / scale, np.array(shifts), (asked - centre) / scale


class FeatureNearest(_FromFeatures):
    """Shift of the training perturbation with the nearest features (Euclidean, standardised).

    Parameters
    ----------
    features
        One row per single perturbation, indexed by name.
    """

    def _change(self, request: Request) -> Change | None:
        x, shifts, asked = self._examples(request)
        return Change(shifts[int(np.argmin(np.linalg.norm(x - asked, axis=1)))])


class FeatureRidge(_FromFeatures):
    """Ridge regression of the shift on standardised features, around the mean shift of the training perturbations.

    Parameters
    ----------
    features
        One row per single perturbation, indexed by name.
    alpha
        Penalty, positive. Features are scaled so that a perturbation's vector has a mean squared length of 1.
    """

    def __init__(self, features: pd.DataFrame, alpha: float = 1.0) -> None:
        super().__init__(features)
        if not 0 < alpha < np.inf:
            raise ValueError(f"alpha={alpha} must be positive and finite.")
        self.alpha = alpha

    def _change(self, request: Request) -> Change | None:
        x, shifts, asked = self._examples(request)
        mean = shifts.mean(axis=0)
        weights = np.linalg.solve(x @ x.T + self.alpha * np.eye(len(x)), x @ asked)
        return Change(mean + weights @ (shifts - mean))
