"""Prior covariance of responses: how much the response of one condition says about another's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from scperturbdiff.retrieval._covariance import additive_covariance, squared_distances
from scperturbdiff.retrieval._doses import DoseStrength

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from scperturbdiff.retrieval._conditions import Conditions, Floats
    from scperturbdiff.retrieval._similarity import ResponseSimilarity


SAME = 1e-6
"""Features that vary less than this, relative to the largest value and the widest feature, are the same for all."""


SAME_CELLS = 0.01
"""Squared distance of the means of the same cells, in units of their sampling variance: they are encoded again."""


@dataclass(frozen=True)
class FeatureMoments:
    """Mean, inverse standard deviation `(n_features,)` and mean squared length, so standardised, of features.

    Of training components only, so that a prediction does not depend on what else is asked for. A feature that is the
    same for all of them tells nothing: its inverse is 0.
    """

    centre: Floats
    size: float
    inverse: Floats | None = None

    @classmethod
    def of(cls, features: Floats, conditions: Conditions) -> FeatureMoments | None:
        """Moments of the components of `conditions` that have features; `None` where these do not differ."""
        rows = features[np.unique(conditions.component[conditions.component >= 0])]
        rows = np.asarray(rows[np.isfinite(rows).all(axis=1)], np.float64)
        if len(rows) < 2:  # a single one lies at its own mean: distances from it would be in units of nothing
            return None
        centre, spread = rows.mean(axis=0), rows.std(axis=0)
        varies = spread > SAME * np.maximum(np.abs(rows).max(axis=0), spread.max())
        if not varies.any():
            return None
        return cls(centre, float(varies.sum()), np.where(varies, 1 / np.where(varies, spread, 1.0), 0.0))

    def standardised(self, features: Floats) -> Floats:
        """Features `(n, n_features)` less their mean, each in units of its standard deviation."""
        centred: Floats = features - self.centre
        return centred if self.inverse is None else centred * self.inverse


class ScaledFeatures(NamedTuple):
    """Features of all components as they are compared.

    At length 1 and standardised, `(n_components, n_features)`, 0 where unknown; which components have any,
    `(n_components,)`; mean squared length of those standardised.
    """

    unit: Floats
    standardised: Floats
    known: NDArray[np.bool_]
    size: float

    @classmethod
    def of(cls, features: Floats, moments: FeatureMoments) -> ScaledFeatures:
        """Those of a table with NaN rows where features are unknown."""
        table = np.asarray(features, np.float64)
        known = np.asarray(np.isfinite(table).all(axis=1))
        unit = np.where(known[:, None], table, 0.0)
        unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
        return cls(unit, np.where(known[:, None], moments.standardised(table), 0.0), known, moments.size)


@dataclass(frozen=True)
class Widths:
    """Parameters of the kernel.

    Attributes
    ----------
    context_scale
        Length scale of the similarity of contexts, in units of the median distance between contexts.
    context_share
        Variance of what depends on the context, relative to that of responses.
    common_share
        Share of a response that all perturbations have in common.
    feature_share
        Share of a component's response that its features explain.
    feature_linear
        Share of that in which responses are linear in features; the rest is alike where features are alike.
    feature_scale
        Length scale of the latter, in units of cosine distance.
    dose_scale
        Length scale of the similarity of doses, in doublings.
    dose_strength
        Power of the strength of doses: 0 if the strength of responses says nothing about doses, 1 if it is theirs.
    nugget
        Variance between populations that nothing explains, relative to the signal.
    response_share
        Share of the covariance that is learned from the responses themselves.
    own_share
        Variance of what only the replicates of a condition have in common, relative to that of responses.
    """

    context_scale: float = 0.5
    context_share: float = 0.8
    common_share: float = 0.2
    feature_share: float = 0.0
    feature_linear: float = 0.5
    feature_scale: float = 0.25
    dose_scale: float = 3.0
    dose_strength: float = 1.0
    nugget: float = 0.05
    response_share: float = 0.0
    own_share: float = 0.0


GRID: dict[str, tuple[float, ...]] = {
    "context_scale": (0.15, 0.25, 0.4, 0.7, 1.2, 3.0),
    "context_share": (0.0, 0.1, 0.3, 1.0),
    "common_share": (0.0, 0.1, 0.3, 0.6),
    "feature_share": (0.0, 0.3, 0.6, 0.9, 0.99),
    "feature_linear": (0.0, 0.5, 1.0),
    "feature_scale": (0.1, 0.25, 0.5, 1.0),
    "dose_scale": (1.0, 2.0, 3.0, 5.0, 8.0),
    "dose_strength": (0.0, 0.5, 1.0),
    "nugget": (0.01, 0.05, 0.2, 0.5, 1.0),
    "own_share": (0.0, 0.1, 0.3, 1.0),
}
"""Values tried for each parameter of the kernel."""
RESPONSE_SHARES = (0.5, 0.8, 1.0)


@dataclass(frozen=True)
class ResponseKernel:
    """Prior covariance of the mean shifts of conditions from the controls at hand, relative to the signal.

    The mean of a few controls is off, and all shifts from it are off by as much. That is part of what is predicted:
    shifts of other conditions from the same controls tell.

    Parameters
    ----------
    widths
        Its parameters.
    median_distance
        Median distance between contexts.
    features
        Of components; `None`: they tell nothing.
    learned
        Similarities learned from responses, for ``widths.response_share``.
    strength
        How strongly doses act.
    mean_variance
        Variance of the mean over contexts and doses of a perturbation's response. Large: a flat prior, under which the
        weights of what is known of a perturbation sum to one (ordinary kriging).
    signal
        Variance of shifts per dimension, the unit; for the sampling noise of controls.
    """

    widths: Widths
    median_distance: float = 1.0
    features: ScaledFeatures | None = None
    learned: ResponseSimilarity | None = None
    strength: DoseStrength = field(default_factory=DoseStrength)
    mean_variance: float = 1.0
    signal: float = 1.0

    def __call__(self, a: Conditions, b: Conditions) -> Floats:
        """Covariance of the shifts of `a` and `b`, `(len(a), len(b))`."""
        share = self.widths.response_share
        squared = squared_distances(a.control_mean, b.control_mean)
        contexts = self._at_distances(squared)

        def at_doses(first: Floats, second: Floats) -> Floats:
            return self._strengths(first, second) * (self.flat + (contexts - self.flat) * self._near(first, second))

        out = self._of_perturbations(a, b, at_doses) + self.of_controls(a, b, squared)
        if self.widths.own_share:
            out += self.widths.own_share * a.same_condition(b)
        return out + share * self.learned(a, b, self._doses) if share and self.learned is not None else out

    def of_controls(self, a: Conditions, b: Conditions, squared: Floats | None = None) -> Floats:
        """Covariance of the errors of the means of controls, `(len(a), len(b))`: 0 unless these are the same cells.

        `squared`: distances of these means, if at hand.
        """
        noise = np.sqrt(np.outer(a.control_noise, b.control_noise))
        if not noise.any():
            return noise
        if squared is None:
            squared = squared_distances(a.control_mean, b.control_mean)
        apart = squared / a.control_mean.shape[1]
        return np.where((a.state[:, None] == b.state) & (apart <= SAME_CELLS * noise), noise / self.signal, 0.0)

    @property
    def flat(self) -> float:
        """Added to the variance of the mean over contexts and doses; how doses differ is as large as a response."""
        return self.mean_variance - 1

    def parts(self, a: Conditions, b: Conditions) -> tuple[Floats, Floats, Floats | None]:
        """What of the covariance depends on the perturbations alone, `(len(a), len(b))` each.

        The covariance is :attr:`flat` times the first, plus :meth:`contexts` less `flat` times the second, plus the
        learned covariance of contexts times the third (`None`: nothing was learned).
        """
        mean = self._of_perturbations(a, b, self._strengths)
        differs = self._of_perturbations(a, b, self._doses)
        if not self.widths.response_share or self.learned is None:
            return mean, differs, None
        return mean, differs, self.widths.response_share * self.learned.of_perturbations(a, b, self._doses)

    def _of_perturbations(self, a: Conditions, b: Conditions, at_doses: Callable[[Floats, Floats], Floats]) -> Floats:
        """Covariance that is not learned from responses, from that of a response at two doses."""
        share, common = self.widths.response_share, self.widths.common_share
        # each component brings along what all have in common. If a combination did so once, a new perturbation would be
        # the part of singles that pairs do not have twice
        shared = at_doses(_mean_dose(a), _mean_dose(b)) * np.outer(_n_parts(a), _n_parts(b))
        return (1 - share) * (common * shared + (1 - common) * additive_covariance(a, b, self._components, at_doses))

    def diagonal(self, a: Conditions) -> Floats:
        """Variance of the shift of each of `a`, `(len(a),)`."""
        return np.diagonal(self(a, a))

    def contexts(self, a: Floats, b: Floats) -> Floats:
        """Covariance of the responses of contexts with control means `a` and `b`."""
        return self._at_distances(squared_distances(a, b))

    def _at_distances(self, squared: Floats) -> Floats:
        near = np.exp(-0.5 * np.maximum(squared, 0) / (self.widths.context_scale * self.median_distance) ** 2)
        return self.mean_variance + self.widths.context_share * near

    def _doses(self, a: Floats, b: Floats) -> Floats:
        """Covariance of the responses at log-scaled doses, `(len(a), len(b))`."""
        return self._near(a, b) * self._strengths(a, b)

    def _near(self, a: Floats, b: Floats) -> Floats:
        if len(a) and len(b) and a.min() == b.min() == a.max() == b.max():  # one dose: no table of ones
            return np.ones((1, 1))
        near: Floats = np.exp(-0.5 * ((a[:, None] - b[None, :]) / self.widths.dose_scale) ** 2)
        return near

    def _strengths(self, a: Floats, b: Floats) -> Floats:
        power = self.widths.dose_strength
        return np.outer(self.strength(a) ** power, self.strength(b) ** power)

    def _components(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> Floats:
        """Covariance of the responses to single components: a part of its own and the part that features share."""
        same = (first[:, None] == second[None, :]).astype(np.float64)
        share, linear = self.widths.feature_share, self.widths.feature_linear
        if self.features is None or share == 0:
            return same
        unit, centred, known, size = self.features
        alike = np.exp((unit[first] @ unit[second].T - 1) / self.widths.feature_scale)
        alike = linear * (centred[first] @ centred[second].T / size) + (1 - linear) * alike
        return (1 - share) * same + share * np.where(np.outer(known[first], known[second]), alike, same)


def _mean_dose(conditions: Conditions) -> Floats:
    there = conditions.component >= 0
    mean: Floats = (conditions.dose * there).sum(1) / np.maximum(there.sum(1), 1)
    return mean


def _n_parts(conditions: Conditions) -> NDArray[np.int64]:
    """Number of components of each condition."""
    number: NDArray[np.int64] = (conditions.component >= 0).sum(1)
    return number
